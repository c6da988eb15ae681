"""Triton kernels: the fused step on GPUs where no CUDA extension was built, and convolutions."""
