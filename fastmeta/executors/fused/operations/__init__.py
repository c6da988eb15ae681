"""The fused step as a table of operations on matrices, which a Triton kernel works through."""
