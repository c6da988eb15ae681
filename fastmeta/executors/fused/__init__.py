"""The fused executors: the whole meta-step of an MLP in one call of C++, or one launch on a GPU."""
