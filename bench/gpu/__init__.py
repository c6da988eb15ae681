"""The fused step and its rivals on one GPU; `bench/gpu.sh` runs all of it."""
