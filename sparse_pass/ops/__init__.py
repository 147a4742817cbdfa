"""The operators of the rewritten graphs: `definitions` has them all, `reference` what they compute."""
