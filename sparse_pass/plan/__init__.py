"""Decide for a whole graph before anything is edited: one frozen plan, or an error."""
