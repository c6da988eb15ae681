"""Which tile a GPU takes: the fastest of a short list, tried once, and never while recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_on_host  # noqa: F401
from torch import Tensor

from fastmeta.kernels import convolve, tiles
from fastmeta.kernels.geometry import Convolution

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

GPU = torch.device("cuda", 0)
LIST = ({"BM": 64}, {"BM": 128}, {"BM": 32})


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tiles that were timed: 128 is the fastest."""
    found: list[int] = []

    def milliseconds(_: Any, tile: tiles.Tile) -> float:
        found.append(tile["BM"])
        return abs(tile["BM"] - 120)

    monkeypatch.setattr(tiles, "milliseconds", milliseconds)
    monkeypatch.setattr(tiles, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    return found


def taken(sizes: str, device: torch.device = GPU) -> int:
    return tiles.fastest(LIST, sizes, lambda _: None, device)["BM"]


def test_a_gpu_tries_each_once_for_a_class_of_sizes(tried: list[int]) -> None:
    assert [taken("small"), taken("small")] == [128, 128]
    assert tried == [64, 128, 32]
    taken("large")
    taken("small", torch.device("cuda", 1))
    assert len(tried) == 9


def test_nothing_is_timed_while_a_stream_is_recorded(tried: list[int], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert taken("small") == 64
    assert not tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert taken("small") == 128
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert taken("small") == 128


def test_the_host_and_deterministic_algorithms_take_the_first(
    tried: list[int], monkeypatch
) -> None:
    assert taken("small", torch.device("cpu")) == 64
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert taken("small") == 64
    assert not tried


@pytest.mark.parametrize("place", range(3))
def test_every_tile_gives_the_same(place: int, monkeypatch) -> None:
    convolution = Convolution((1, 1), (1, 1), (1, 1), 1)
    x, dy = torch.randn(1, 2, 32, 5, 7), torch.randn(1, 2, 48, 5, 7)
    w = torch.randn(1, 48, 32, 3, 3)

    def found() -> tuple[Tensor, ...]:
        y, partial, rows = convolve.with_statistics(convolution, x, w, (5, 7))
        sizes = torch.full((partial.shape[1], 1), float(rows))
        sizes[-1] = 2 * 5 * 7 - rows * (len(sizes) - 1)
        mean = (partial[:, :, 0] * sizes).sum(1) / sizes.sum()
        dx = convolve.to_input(convolution, [(dy, w)], (5, 7))
        return y, mean, dx, convolve.to_weight(convolution, [(dy, x)], (48, 32, 3, 3))

    expected = found()
    monkeypatch.setattr(convolve, "fastest", lambda tiles, *_: tiles[place])
    for a, b in zip(found(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
