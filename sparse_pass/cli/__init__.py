"""What can be asked from a shell: ``python -m sparse_pass``, or ``sparse-pass``."""
