"""The tiles of a convolution's programs: a short list a kernel, of which a GPU takes its fastest.

Each GPU tries the list once for each class of sizes, at the first call that is not being recorded.
Where torch is asked for deterministic algorithms, and on the host, the first of a list serves:
tiles differ in how sums are divided, so that another choice is another rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

Tile = dict[str, int]
"""Sizes of a tile, and how its program is compiled."""

REPEATS = 10
"""Launches that are timed as one."""

AHEAD = 1_000_000
"""Clocks for which the device waits, so that the host launches faster than it computes."""

_fastest: dict[Hashable, Tile] = {}


def of_convolution(inputs: int, outputs: int, dtype: torch.dtype) -> Sequence[Tile]:
    """BM pixels by BN channels, in steps of BK numbers of a filter; by the channels of a group.

    Where channels are not multiples of 16, numbers are loaded one by one, whose addresses would
    not all fit into the registers of a larger tile.
    """
    if dtype == torch.float64:
        return ({"BM": 32, "BN": 32, "BK": 16},)
    if inputs % 16 or outputs % 16:
        # Four warps spill where the single output is a constant of Triton's.
        return ({"BM": 32, "BN": 32, "BK": 16, "num_warps": 8 if outputs == 1 else 4},)
    if outputs <= 16:
        return ({"BM": 64, "BN": 16, "BK": 32},)
    if outputs <= 32:
        return (
            {"BM": 64, "BN": 32, "BK": 16},
            {"BM": 128, "BN": 32, "BK": 16, "num_warps": 8},
            {"BM": 32, "BN": 32, "BK": 32, "num_warps": 2},
        )
    return (
        {"BM": 64, "BN": 64, "BK": 32},
        {"BM": 128, "BN": 64, "BK": 16, "num_warps": 8},
        {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8},
    )


def of_weight_gradient(inputs: int, outputs: int, dtype: torch.dtype) -> Sequence[Tile]:
    """BM output channels by BN numbers of a filter, in steps of BK pixels."""
    if dtype == torch.float64:
        return ({"BM": 16, "BN": 32, "BK": 16},)
    if inputs % 16 or outputs % 16:
        return ({"BM": 32, "BN": 32, "BK": 16},)
    return (
        {"BM": 32, "BN": 64, "BK": 16},
        {"BM": 64, "BN": 64, "BK": 16},
        {"BM": 32, "BN": 32, "BK": 32},
    )


def fastest(
    tiles: Sequence[Tile], sizes: Hashable, launch: Callable[[Tile], object], device: torch.device
) -> Tile:
    """The tile to launch sizes of this class by; `launch` may be called many times."""
    if len(tiles) == 1 or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return tiles[0]
    key = device, sizes
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return tiles[0]
        times = [milliseconds(launch, tile) for tile in tiles]
        _fastest[key] = tiles[times.index(min(times))]
    return _fastest[key]


def milliseconds(launch: Callable[[Tile], object], tile: Tile) -> float:
    """Of `REPEATS` launches on the current stream, without the compiler's time."""
    launch(tile)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD)
    start.record()
    for _ in range(REPEATS):
        launch(tile)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
