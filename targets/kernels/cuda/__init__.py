"""CUDA kernels for packed weights."""
