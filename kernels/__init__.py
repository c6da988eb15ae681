"""Triton kernels: convolutions, and what follows them in a block."""
