"""Triton kernels for NVIDIA GPUs. Importing this package needs neither Triton nor a GPU."""
