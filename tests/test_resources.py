"""A step leaves nothing behind: no memory, no change to model or generator, no harm to threads."""

from __future__ import annotations

import copy
import gc
import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

STATUS = Path("/proc/self/status")
Loss = Callable[[Tensor, Tensor], Tensor]
OPTIONS = {"inner_steps": 2, "inner_lr": 0.05}
WARM_UP = 0.2
# Pages that the allocator keeps come and go. One copy of the parameters (7 kB) left behind by each
# task of a step is 6 MB over the 240 steps of the shortest run.
SLACK = 3 * 2**20


def _sinusoid_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )


def _small_network() -> nn.Module:
    """With buffers that a forward pass would write."""
    return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def _tasks(seed: int = 1) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)

    def examples() -> tuple[Tensor, Tensor]:
        x, y = torch.randn(2, 4, 10, 1, generator=random)
        return x, y

    return examples(), examples()


def _resident() -> int:
    """Bytes of this process in memory."""
    if not STATUS.exists():
        pytest.skip("resident memory is read from /proc/self/status, which only Linux has")
    found = re.search(r"VmRSS:\s+(\d+) kB", STATUS.read_text())
    assert found
    return int(found[1]) * 1024


def _live_tensors() -> int:
    gc.collect()
    # By type: `isinstance` asks the object, and torch has some that warn when asked.
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def _standard() -> Loss:
    return F.mse_loss


def _opaque() -> Loss:
    """A new lambda each step, around a new tensor that requires grad."""
    fresh = torch.ones((), requires_grad=True)
    return lambda y, t: (fresh * y - t).square().mean()


@pytest.mark.parametrize(
    ("form", "steps", "make_loss"),
    [
        pytest.param("vmap", 1000, _standard, id="vmap"),
        pytest.param("loop", 300, _standard, id="loop"),
        pytest.param("sweep", 300, _standard, id="sweep"),
        pytest.param("loop", 300, _opaque, id="opaque-loss"),
        pytest.param("vmap", 300, _opaque, id="opaque-loss-tried-by-vmap"),
    ],
)
def test_steps_leak_nothing(
    form: str, steps: int, make_loss: Callable[[], Loss], only, monkeypatch
) -> None:
    only(*{form} if make_loss is _standard else {form, "loop"})
    monkeypatch.setattr("fastmeta.executors.generic.cost.loop", lambda *_: 1.0)
    model, tasks = _sinusoid_network(), _tasks()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def train(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            fastmeta.maml_step(model, *tasks, **OPTIONS, loss_fn=make_loss()).loss.backward()
            optimizer.step()

    train(int(WARM_UP * steps))
    tensors, resident = _live_tensors(), _resident()
    train(int((1 - WARM_UP) * steps))
    assert _live_tensors() <= tensors
    assert _resident() - resident < SLACK


def test_a_step_that_is_not_followed_by_backward_leaks_nothing() -> None:
    model, tasks = _sinusoid_network(), _tasks()
    fastmeta.maml_step(model, *tasks, **OPTIONS, loss_fn=F.mse_loss)
    before = _live_tensors()
    for _ in range(10):
        fastmeta.maml_step(model, *tasks, **OPTIONS, loss_fn=F.mse_loss)
    assert _live_tensors() == before


def test_backward_frees_what_was_kept_for_it() -> None:
    model, tasks = _sinusoid_network(), _tasks()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    fastmeta.maml_step(model, *tasks, **OPTIONS, loss_fn=F.mse_loss)
    before = _live_tensors()
    loss = fastmeta.maml_step(model, *tasks, **OPTIONS, loss_fn=F.mse_loss).loss
    loss.backward()
    assert _live_tensors() == before + 1


@pytest.mark.parametrize("loss_fn", [F.mse_loss, lambda y, t: (y - t).abs().sum() / 10])
def test_what_is_remembered_of_a_model_does_not_keep_it_alive(loss_fn) -> None:
    model = _small_network()
    fastmeta.maml_step(model, *_tasks(), **OPTIONS, loss_fn=loss_fn).loss.backward()
    fastmeta.adapt(model, _tasks()[0], **OPTIONS, loss_fn=loss_fn)
    fastmeta.explain(model, *_tasks(), **OPTIONS, loss_fn=loss_fn)
    seen = weakref.ref(model), weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_a_loss_module_is_not_kept_alive() -> None:
    class Loss(nn.Module):
        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return (y - t).square().mean()

    model, loss_fn = _small_network(), Loss()
    fastmeta.maml_step(model, *_tasks(), **OPTIONS, loss_fn=loss_fn).loss.backward()
    seen = weakref.ref(loss_fn)
    del loss_fn
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("executor", ["auto", "generic"])
def test_data_is_not_kept_alive(executor: str) -> None:
    model, tasks = _small_network(), _tasks()
    seen = [weakref.ref(tensor) for tensor in sum(tasks, ())]
    fastmeta.maml_step(model, *tasks, loss_fn=F.mse_loss, executor=executor).loss.backward()
    del tasks
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4


def _snapshot(model: nn.Module) -> list[Tensor]:
    """Every tensor that hangs on the model, and the state of the generator."""
    state = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    gradients = [p.grad for p in model.parameters()]
    return [tensor.clone() for tensor in (*state, *gradients, torch.get_rng_state())]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda m, s, q: fastmeta.maml_step(m, s, q, loss_fn=F.mse_loss), id="step"),
        pytest.param(lambda m, s, q: fastmeta.explain(m, s, q, loss_fn=F.mse_loss), id="explain"),
        pytest.param(lambda m, s, q: fastmeta.adapt(m, s, loss_fn=F.mse_loss)(q[0]), id="adapt"),
    ],
)
def test_model_gradients_and_generator_stay_bit_for_bit(
    call, form: str, mode: str, force_form
) -> None:
    force_form(form)
    model = _small_network()
    model(torch.randn(20, 1)).sum().backward()  # statistics and gradients that are not zero
    model.train(mode == "train")
    flags = [(m.training, len(m._forward_hooks), len(vars(m))) for m in model.modules()]
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    before = _snapshot(model)
    call(model, *_tasks())
    assert all(map(torch.equal, _snapshot(model), before))
    assert tensors == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert flags == [(m.training, len(m._forward_hooks), len(vars(m))) for m in model.modules()]


def test_data_stays_bit_for_bit() -> None:
    tasks = _tasks()
    before = copy.deepcopy(tasks)
    fastmeta.maml_step(_small_network(), *tasks, **OPTIONS, loss_fn=F.mse_loss).loss.backward()
    pairs = zip(sum(tasks, ()), sum(before, ()), strict=True)
    assert all(torch.equal(a, b) and a.grad is None for a, b in pairs)


def _train(model: nn.Module, seed: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(5):
        optimizer.zero_grad()
        tasks = _tasks(10 * seed + step)
        fastmeta.maml_step(model, *tasks, **OPTIONS, loss_fn=F.mse_loss).loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _at_once(count: int, function: Callable[[int], Any]) -> list[Any]:
    """`function(i)` in a thread each, all started together."""
    ready = threading.Barrier(count)

    def run(i: int) -> Any:
        torch.set_num_threads(1)  # the main thread's setting does not reach the others
        ready.wait()
        return function(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
def test_four_threads_give_the_numbers_that_one_gives(form: str, force_form) -> None:
    force_form(form)
    models = [_sinusoid_network() for _ in range(4)]
    expected = [_train(copy.deepcopy(model), seed) for seed, model in enumerate(models)]
    generator = torch.get_rng_state()
    got = _at_once(4, lambda seed: _train(models[seed], seed))
    for ours, theirs in zip(got, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert torch.equal(torch.get_rng_state(), generator)


def test_four_threads_may_step_the_same_model() -> None:
    model = _small_network()

    def loss(_: int) -> Tensor:
        out = fastmeta.maml_step(model, *_tasks(), **OPTIONS, loss_fn=F.mse_loss)
        return out.loss.detach()

    expected, before = loss(0), copy.deepcopy(model.state_dict())
    got = _at_once(4, lambda _: [loss(i) for i in range(5)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(one, expected) for several in got for one in several)


class Visited(nn.Module):
    """Its forward waits for a module in another thread."""

    def __init__(self, pool: ThreadPoolExecutor, other: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.visit = lambda: pool.submit(other, torch.ones(2, 1)).exception()
        self.failures: list[BaseException | None] = []

    def forward(self, x: Tensor) -> Tensor:
        self.failures.append(self.visit())
        return self.layer(x)

    def __deepcopy__(self, memo: dict) -> Visited:
        twin = copy.copy(self)
        twin._modules = copy.deepcopy(self._modules, memo)
        return twin


def test_another_threads_modules_run_on_while_a_model_is_read() -> None:
    with ThreadPoolExecutor(1) as pool:
        model = Visited(pool, nn.Linear(1, 1))
        fastmeta.explain(model, *_tasks(), loss_fn=F.mse_loss)
    assert model.failures
    assert not any(model.failures)
