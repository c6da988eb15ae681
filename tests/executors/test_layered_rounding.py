"""The float32 convolutional step where digits could be lost, beside the plain loop in float32."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from convolutional import Block, apart, batch, flat
from torch import Tensor, nn

import fastmeta

pytest.importorskip("fastmeta._C", reason="the extension was not built here")


def errors(model: nn.Module, *data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of the plain loop's gradient and ours, beside float64."""
    exact = copy.deepcopy(model).double()
    wide = oracle.split(*((x.double(), y) for x, y in data))
    wanted = oracle.maml(exact, wide, list(exact.parameters())).gradients
    plain = oracle.maml(model, oracle.split(*data), list(model.parameters())).gradients
    out = fastmeta.maml_step(model, *data, executor="layered")
    assert out.executor == "layered-cpu"
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    return apart(plain, wanted), apart(ours, wanted)


def noise(
    level: float, image: tuple[int, ...] = (1, 8, 8), count: int = 5, *, each: bool = False
) -> tuple[Tensor, Tensor]:
    """Images of deviation 1 about one level, or about levels of their own of that deviation."""
    x, y = batch(image, 4, count, torch.float32)
    return x + (level * torch.randn(4, count, 1, 1, 1) if each else level), y


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *flat(144))


def test_winograds_large_tiles_round_little() -> None:
    """Three times as much as torch's convolutions do, as it was found."""
    layers = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
    model = nn.Sequential(*layers, *flat(64 * 14 * 13))
    theirs, ours = errors(model, *(batch((64, 14, 13), 2, n, torch.float32) for n in (6, 7)))
    assert ours < 5 * theirs


def test_variance_far_from_zero_is_sound() -> None:
    """Pixels of mean 1000 and deviation 1: squares of floats would leave nothing of a variance."""
    model = nn.Sequential(Block(1, 4), Block(4, 4), *flat(4 * 4))
    _, ours = errors(model, noise(1000.0), noise(1000.0))
    # The convolution's own rounding, 1000 times the deviation, is in what it normalises.
    assert ours < 1000 * 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("brightness", [100.0, 1000.0])
def test_filters_that_take_images_levels_away_lose_few_digits(brightness: float) -> None:
    """Where images' levels differ by far more than what is in them, squares' sums would cancel."""
    model = network()
    with torch.no_grad():
        model[0].weight -= model[0].weight.mean((2, 3), keepdim=True)
    theirs, ours = errors(model, *(noise(brightness, each=True) for _ in "ab"))
    assert ours < 32 * theirs + 1e-6


def test_a_level_that_all_pixels_share_takes_no_digits() -> None:
    """Batch statistics take it away; what is left must not have been rounded beside it."""
    theirs, ours = errors(network(), noise(1000.0), noise(1000.0))
    assert ours < 2e-6
    assert theirs > 10 * ours


def test_hardly_more_pixels_than_numbers_a_patch() -> None:
    """Of such patches batch statistics leave the weight's gradient a small part."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 17, 3, stride=(4, 3), padding=(0, 2), dilation=(3, 2)),
        nn.BatchNorm2d(17, affine=False), nn.ReLU(), *flat(34),
    )  # fmt: skip
    theirs, ours = errors(model, *(noise(100.0, (3, 7, 6), 2) for _ in "ab"))
    assert ours < 8 * theirs
