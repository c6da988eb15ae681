"""How images lie in memory: `[T, N, C, H, W]` with the channels last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(x: Tensor) -> Tensor:
    """`[T, N, C, H, W]` as one batch `[T N, C, H, W]`, channels last; a view where it lies so."""
    batch = x.flatten(0, 1)
    if not batch.is_contiguous(memory_format=torch.channels_last):
        return batch.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = batch.shape
    # Where a size is 1 both layouts fit, and torch would go by the strides.
    strides = (channels * height * width, 1, width * channels, channels)
    return batch.as_strided(batch.shape, strides)


def rows(x: Tensor) -> Tensor:
    """`[T, N, C, ...]` as `[T, R, C]`; a view where the channels lie last."""
    return x.movedim(2, -1).flatten(1, -2)


def like_rows(y: Tensor, x: Tensor) -> Tensor:
    """`[T, R, C]` in the shape of `x`, `[T, N, C, ...]`."""
    return y.view(x.movedim(2, -1).shape).movedim(-1, 2)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Batches behind one another; a single one as it is."""
    return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]
