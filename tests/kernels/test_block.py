"""A convolution's output through batch norm, activation and pooling: four rules by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton_on_host  # noqa: F401
from torch import Tensor

from fastmeta.kernels import block, convolve
from fastmeta.kernels.block import Block
from fastmeta.kernels.geometry import Convolution

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # by torch.func
]

TASKS, EPS = 2, 1e-3
CONVOLUTION = Convolution((1, 1), (1, 1), (1, 1), 1)

# Images, their size, output channels; tiles are 32 pixels, the last of them not full.
SIZES = [(3, (5, 7), 3), (1, (2, 2), 1), (2, (6, 7), 33)]
BLOCKS = {
    "relu-pooled": (0.0, (2, 2)), "leaky-unevenly": (0.2, (1, 3)), "relu": (0.0, (1, 1)),
    "pooled": (1.0, (2, 1)),
}  # fmt: skip


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def drawn(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def reference(of: Block, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of all tasks, each by its own statistics."""
    h = x - x.mean((1, 3, 4), keepdim=True)
    h = h / (h.square().mean((1, 3, 4), keepdim=True) + of.eps).sqrt()
    z = h * weight[:, None, :, None, None] + bias[:, None, :, None, None]
    a = torch.where(z <= 0, z * of.slope, z)
    return F.max_pool2d(a.flatten(0, 1), of.window).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_four_rules(name: str, size: tuple[int, tuple[int, int], int], shared: bool) -> None:
    of, (count, image, channels) = Block(EPS, *BLOCKS[name]), size
    if image[1] < of.window[1]:
        image = (image[0], of.window[1])
    data, filters = drawn(TASKS, count, 2, *image), drawn(TASKS, channels, 2, 3, 3)
    x, partial, rows = convolve.with_statistics(CONVOLUTION, data, filters, image)
    close(x, torch.stack([F.conv2d(data[t], filters[t], padding=1) for t in range(TASKS)]))
    weight, bias = (drawn(1 if shared else TASKS, channels) for _ in range(2))
    rx, rweight, rbias = drawn(*x.shape), drawn(TASKS, channels), drawn(TASKS, channels)
    w, b = weight.repeat(TASKS // len(weight), 1), bias.repeat(TASKS // len(bias), 1)
    expected, ry = torch.func.jvp(lambda *at: reference(of, *at), (x, w, b), (rx, rweight, rbias))
    dy, rdy = drawn(*expected.shape), drawn(*expected.shape)

    def gradients(x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(lambda *at: reference(of, *at), x, w, b)[1](dy)

    (dx, dw, db), (rdx, rdw, rdb) = torch.func.jvp(
        gradients, (x, w, b, dy), (rx, rweight, rbias, rdy)
    )

    y, done = block.forward(of, x, partial, rows, weight, bias)
    close(y, expected)
    close(block.backward_sums(done, dy), torch.stack([db, dw]))
    close(block.backward(done), dx)
    close(block.tangent(done, rx, rweight, rbias), ry)
    rsums = block.tangent_sums(done, rdy)
    close(rsums, torch.stack([rdb, rdw]))
    close(block.tangent_backward(done, rdy, rsums), rdx)


def test_ties_fall_as_torch_lets_them_and_no_number_is_a_maximum() -> None:
    of = Block(0.0, 0.0, (2, 2))
    # Mean 0 and variance 1, so that zeros stay zeros.
    x = torch.tensor([[1.0, 1.0, 0, -1], [-1, -1, 0, 1]]).double().view(1, 1, 1, 2, 4) * 2**0.5
    x = x / x.square().mean().sqrt()
    partial = torch.stack([x.mean(), x.square().sum()]).view(1, 1, 2, 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    y, done = block.forward(of, x, partial, 8, one, 0 * one)
    leaf = x[0].clone().requires_grad_()
    found, places = F.max_pool2d(leaf.relu(), 2, return_indices=True)
    close(y[0], found.detach())
    assert (done.kept // 2).flatten().tolist() == [0, 3]
    assert places.flatten().tolist() == [0, 7]
    x[..., 0, 1] = torch.nan
    y, _ = block.forward(of, x, partial, 8, one, 0 * one)
    assert y.isnan().flatten().tolist() == [True, False]


def test_a_variance_far_from_zero_keeps_its_digits() -> None:
    """Statistics are merged, not differences of sums of squares."""
    data = (1e4 + torch.randn(1, 5, 1, 6, 7)).contiguous()
    identity = torch.ones(1, 1, 1, 1, 1)
    pointwise = Convolution((1, 1), (0, 0), (1, 1), 1)
    x, partial, rows = convolve.with_statistics(pointwise, data, identity, (6, 7))
    one = torch.ones(1, 1)
    _, done = block.forward(Block(0.0, 1.0, (1, 1)), x, partial, rows, one, 0 * one)
    expected = data.double().var(unbiased=False).rsqrt()
    torch.testing.assert_close(done.statistics[1, 0, 0].double(), expected, rtol=1e-4, atol=0)
