"""No pass writes the model's own buffers, whatever their size and memory."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.network.stateless import _SMALL, private

LARGE = _SMALL + 1
MEMORY = pytest.mark.parametrize("memory", ["small", "large", "numpy", "mapped", "shared", "view"])


class Settings:
    """A place that no snapshot of a model looks at."""

    writes = ""


class Writes(nn.Module):
    """Writes its buffer only once a setting says so; so no plan made before knows of it."""

    def __init__(self, buffer: Tensor, settings: Settings) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("table", buffer)
        self._settings = [settings]

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        writes = self._settings[0].writes
        if writes == "constant":
            self.table.add_(1.0)
        elif writes == "data":
            self.table[:2].lerp_(y.detach().mean(0), 0.5)
        elif writes == "natively":  # behind the version counter
            mean, variance = self.table[:2], torch.ones_like(self.table[:2])
            y = y + 0.1 * F.batch_norm(y, mean, variance, training=True)
        elif writes == "another view":
            self.table.data.view(-1).numpy()[:] = 3.0
        return y + torch.tanh(self.table[:2])


def _buffer(memory: str, folder: Any) -> Tensor:
    values = torch.linspace(-1.0, 1.0, 16 if memory == "small" else LARGE)
    if memory == "numpy":
        return torch.from_numpy(np.linspace(-1.0, 1.0, LARGE, dtype=np.float32))
    if memory == "mapped":
        torch.save(values, folder / "table.pt")
        return torch.load(folder / "table.pt", mmap=True)
    if memory == "shared":
        return values.share_memory_()
    return torch.cat([torch.zeros(8), values])[8:] if memory == "view" else values


def _tasks() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def examples(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(5, count, 3), torch.randint(2, (5, count))

    return examples(4), examples(6)


def _numbers(model: nn.Module, tasks: Any) -> list[Tensor]:
    model.zero_grad()
    out = fastmeta.maml_step(model, *tasks, inner_lr=0.1, inner_steps=2)
    out.loss.backward()
    return [out.loss.detach(), out.task_losses, *(p.grad.clone() for p in model.parameters())]


@MEMORY
@pytest.mark.parametrize("writes", ["constant", "data", "natively", "another view"])
@pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
def test_a_buffer_written_after_the_plan_was_made(
    memory: str, writes: str, form: str, force_form: Any, tmp_path: Any
) -> None:
    force_form(form)
    settings, tasks = Settings(), _tasks()
    model = Writes(_buffer(memory, tmp_path), settings)
    own, address, expected = model.table, model.table.data_ptr(), model.table.clone()
    _numbers(model, tasks)
    settings.writes = writes
    numbers = _numbers(model, tasks)
    assert model.table is own
    assert own.data_ptr() == address
    assert torch.equal(own, expected)
    force_form("loop")  # by a plan that knows
    expected_numbers = _numbers(copy.deepcopy(model), tasks)
    torch.testing.assert_close(numbers, expected_numbers)


@MEMORY
def test_the_buffer_stays_an_ordinary_one(memory: str, tmp_path: Any) -> None:
    model = Writes(_buffer(memory, tmp_path), Settings())
    tasks, alias = _tasks(), model.table.detach()
    kept = fastmeta.adapt(model, tasks[0], executor="generic")
    before = _numbers(model, tasks)
    assert torch.equal(pickle.loads(pickle.dumps(model.table)), model.table)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved)["table"], model.table)
    with torch.no_grad():
        model.table.fill_(0.5)
    assert torch.equal(alias, model.table)
    assert np.all(alias.numpy() == 0.5)
    assert not torch.equal(_numbers(model, tasks)[0], before[0])
    # What was adapted keeps the table that it was adapted with.
    expected = kept[0](tasks[1][0][0])
    torch.testing.assert_close(kept(tasks[1][0])[0], expected)


@MEMORY
@pytest.mark.parametrize("writes", ["constant", "data"])
@pytest.mark.parametrize("form", ["vmap", "loop"])
def test_a_buffer_of_adapted_tasks(
    memory: str, writes: str, form: str, force_form: Any, tmp_path: Any
) -> None:
    force_form(form)
    settings, tasks = Settings(), _tasks()
    model = Writes(_buffer(memory, tmp_path), settings)
    expected = model.table.clone()
    adapted = fastmeta.adapt(model, tasks[0])
    settings.writes = writes
    first = adapted(tasks[1][0])
    assert torch.equal(adapted(tasks[1][0]), first)
    assert torch.equal(model.table, expected)
    assert torch.equal(adapted[0].table, expected)


def test_a_large_buffer_that_learns_gets_its_gradient() -> None:
    gradients = []
    for make in (lambda table: table, lambda table: table.clone()):
        torch.manual_seed(1)
        leaf = torch.linspace(-1.0, 1.0, LARGE).requires_grad_()
        model = Writes(make(leaf), Settings())
        fastmeta.maml_step(model, *_tasks(), inner_steps=2).loss.backward()
        assert leaf.grad is not None
        assert leaf.grad[:2].abs().min() > 0
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(float(LARGE)),
        lambda: torch.arange(float(2 * LARGE))[::2],
        lambda: torch.from_numpy(np.arange(float(LARGE))),
        lambda: torch.ones(1).expand(LARGE),
        lambda: torch.eye(200).to_sparse(),
        lambda: torch.ones(LARGE, dtype=torch.cfloat).conj(),
        lambda: torch.arange(3.0),
    ],
    ids=["whole", "strided", "numpy", "expanded", "sparse", "conjugate", "small"],
)
def test_a_private_tensor(make: Callable[[], Tensor]) -> None:
    tensor, expected = make(), make()
    twin = private(tensor)
    assert torch.equal(twin.to_dense(), expected.to_dense())
    twin.zero_()
    assert torch.equal(tensor.to_dense(), expected.to_dense())


def test_a_large_buffer_is_not_copied_where_nothing_writes_it() -> None:
    table = torch.zeros(LARGE)
    twin = private(table)
    twin.sum()
    assert torch._C._data_address(twin) == torch._C._data_address(table)
