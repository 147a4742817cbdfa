"""GPU kernels. They import nothing of the package, and the CUDA operators import them on first use."""
