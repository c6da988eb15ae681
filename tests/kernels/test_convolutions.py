"""Convolutions of all tasks beside torch's, one task at a time; sizes are odd in every way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton_on_host  # noqa: F401
from torch import Tensor

from fastmeta.kernels import convolve
from fastmeta.kernels.geometry import Convolution

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TASKS, COUNT = 2, 3

CASES = {
    "pixel": ((1, 1), (1, 1, 1, 1), Convolution((1, 1), (0, 0), (1, 1), 1)),
    "padded": ((5, 7), (17, 3, 3, 3), Convolution((1, 1), (1, 1), (1, 1), 1)),
    "strided": ((7, 6), (4, 2, 3, 3), Convolution((2, 2), (1, 1), (1, 1), 1)),
    "uneven": ((7, 5), (3, 2, 2, 3), Convolution((2, 3), (1, 0), (1, 1), 1)),
    "past-the-kernel": ((9, 8), (4, 2, 2, 2), Convolution((3, 3), (0, 0), (1, 1), 1)),
    "dilated": ((9, 8), (3, 2, 3, 2), Convolution((2, 1), (2, 1), (2, 3), 1)),
    "depthwise": ((5, 4), (4, 1, 3, 3), Convolution((1, 1), (1, 1), (1, 1), 4)),
    "groups": ((7, 6), (6, 2, 3, 2), Convolution((1, 2), (0, 0), (2, 1), 2)),
    "sixteens": ((4, 3), (32, 16, 3, 3), Convolution((1, 1), (1, 1), (1, 1), 1)),
    "wide": ((4, 4), (35, 34, 2, 2), Convolution((1, 1), (0, 0), (1, 1), 1)),
}


class Drawn:
    """Two images, weights and output gradients of every task."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, shared: bool = False) -> None:
        image, weight, self.convolution = CASES[name]
        inputs = weight[1] * self.convolution.groups
        one = lambda *shape: torch.randn(shape, dtype=dtype)  # noqa: E731
        self.weight, self.image = weight, image
        self.x, self.x2 = one(TASKS, COUNT, inputs, *image), one(TASKS, COUNT, inputs, *image)
        self.w, self.w2 = one(1 if shared else TASKS, *weight), one(TASKS, *weight)
        y = self.each(self.x, self.w)
        self.out = (y.shape[3], y.shape[4])
        self.dy, self.dy2 = one(*y.shape), one(*y.shape)

    def each(self, x: Tensor, w: Tensor) -> Tensor:
        """Torch's own, task by task."""
        c = self.convolution
        w = w.expand(len(x), *w.shape[1:])
        return torch.stack(
            [
                F.conv2d(x[t], w[t], None, c.stride, c.padding, c.dilation, c.groups)
                for t in range(len(x))
            ]
        )


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("name", CASES)
def test_two_convolutions_are_one_sum(name: str, shared: bool) -> None:
    d = Drawn(name, shared=shared)
    got = convolve.convolve(d.convolution, [(d.x2, d.w), (d.x, d.w2)], d.out)
    close(got, d.each(d.x2, d.w) + d.each(d.x, d.w2))
    assert got.movedim(2, -1).is_contiguous()
    close(convolve.convolve(d.convolution, [(d.x, d.w)], d.out), d.each(d.x, d.w))


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_the_input(name: str) -> None:
    d = Drawn(name)
    pairs = [(d.dy2, d.w), (d.dy, d.w2)]
    x = d.x.clone().requires_grad_()
    single, other = (
        torch.autograd.grad(d.each(x, w), x, dy)[0] for dy, w in pairs
    )  # fmt: skip
    close(convolve.to_input(d.convolution, pairs[:1], d.image), single)
    close(convolve.to_input(d.convolution, pairs, d.image), single + other)


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_the_weight(name: str) -> None:
    d = Drawn(name)
    pairs = [(d.dy2, d.x), (d.dy, d.x2)]
    w = d.w.clone().requires_grad_()
    single, other = (
        torch.autograd.grad(d.each(x, w), w, dy)[0] for dy, x in pairs
    )  # fmt: skip
    close(convolve.to_weight(d.convolution, pairs[:1], d.weight), single)
    close(convolve.to_weight(d.convolution, pairs, d.weight), single + other)


@pytest.mark.parametrize("name", ["sixteens", "wide"])
def test_float32_by_its_own_tiles(name: str) -> None:
    d = Drawn(name, torch.float32)
    pairs = [(d.x, d.w)]
    got = convolve.convolve(d.convolution, pairs, d.out)
    depth = d.weight[1] * d.weight[2] * d.weight[3]
    sizes = d.each(d.x.abs().double(), d.w.abs().double())
    error = (got - d.each(d.x.double(), d.w.double())).abs()
    assert (error <= depth * torch.finfo(torch.float32).eps * sizes).all()


def test_more_pixels_than_a_part_holds() -> None:
    """A weight's gradient is summed in parts, whose border lies inside an image."""
    convolution = Convolution((1, 1), (1, 1), (1, 1), 1)
    x, dy = (torch.randn(1, 3, 2, 13, 11, dtype=torch.float64) for _ in range(2))
    w = torch.zeros(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(F.conv2d(x[0], w, padding=1), w, dy[0])
    close(convolve.to_weight(convolution, [(dy, x)], (2, 2, 3, 3))[0], expected)
