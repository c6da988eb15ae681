"""What products of matrices on a GPU may round: torch's own switches, read in one place."""

from __future__ import annotations

from typing import Any

import torch


def of_products(dtype: torch.dtype) -> str:
    """Of kernels over numbers of this type: `"ieee"`, `"tf32"` or `"bf16"`.

    Of float32, TF32 where `torch.backends.cuda.matmul` allows it, and bfloat16 where that came by
    `torch.set_float32_matmul_precision("medium")`. What is summed is never rounded so.
    """
    switch: Any = torch.backends.cuda.matmul
    # torch before 2.9 knows the older switch alone, and a later one warns of it.
    name = getattr(switch, "fp32_precision", None) or ("tf32" if switch.allow_tf32 else "ieee")
    if dtype != torch.float32 or name != "tf32":
        return "ieee"
    return "bf16" if _medium() else "tf32"


def _medium() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # the newer switches say what the older one has no word for
        return False
