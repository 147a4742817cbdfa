"""Predictions for a GPU that is not there, from measurements that the package ships."""
