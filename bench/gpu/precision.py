"""TF32 products for every side, or for none."""

from __future__ import annotations

import importlib.util

import torch


def allow_tf32(allowed: bool) -> None:
    """Of torch's products and convolutions, Triton's, and JAX's where it is installed."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    if importlib.util.find_spec("jax") is not None:
        import jax

        setting = "tensorfloat32" if allowed else "highest"
        jax.config.update("jax_default_matmul_precision", setting)
