"""The reference of every operator and kernel: plain torch on any device, and the oracle of the tests."""
