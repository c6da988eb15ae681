"""Long sets in chunks, in the fused step: the numbers of whole sets, and storage that stays small.

`FASTMETA_CHUNK` says how many examples go at a time; "0" is all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.executors.extension import extension
from fastmeta.executors.fused.lowering import NONE
from fastmeta.inner import SGD, Adam, RMSprop

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import cpu_only

pytestmark = cpu_only

Batch = tuple[Tensor, Tensor]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "tanh": lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)),
    "sine": lambda: nn.Sequential(
        nn.Linear(3, 8), Sine(), nn.Linear(8, 8), Sine(), nn.Linear(8, 2)
    ),
    "residual": lambda: nn.Sequential(nn.Linear(3, 8), Block(), Block(), nn.Linear(8, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)),
}

log_std = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)


def likelihood(prediction: Tensor, target: Tensor) -> Tensor:
    """A Gaussian's with a learned deviation."""
    z = (target - prediction) * torch.exp(-log_std)
    return (0.5 * z.square() + log_std).sum(-1).mean()


LOSSES: dict[str, Any] = {
    "mse": F.mse_loss, "huber": nn.HuberLoss(delta=0.5), "likelihood": likelihood,
    "bce": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0]).double()),
}  # fmt: skip

SUPPORT, QUERY = 23, 17


def data(tasks: int, steps: int = 0) -> tuple[Batch, Batch]:
    def drawn(*front: int) -> Batch:
        return torch.randn(*front, 3).double(), torch.rand(*front, 2).double()

    return drawn(tasks, *((steps,) if steps else ()), SUPPORT), drawn(tasks, QUERY)


def found(
    network: str, support: Any, query: Any, chunk: str, monkeypatch: pytest.MonkeyPatch,
    executor: str = "fused", **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Losses, outputs and gradients of a new model: the environment is read once a model."""
    monkeypatch.setenv("FASTMETA_CHUNK", chunk)
    torch.manual_seed(3)
    model = NETWORKS[network]().double()
    out = fastmeta.maml_step(model, support, query, executor=executor, **options)
    assert (out.executor == "fused-cpu") == (executor == "fused")
    leaves = [*model.parameters(), log_std]
    gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    return [out.task_losses, out.support_losses, *out.query_outputs] + [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def compare(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", ["1", "6", "16"])
@pytest.mark.parametrize("memory", ["saved", "reversible"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_chunks_give_the_numbers_of_whole_sets(
    network: str, loss: str, memory: str, chunk: str, monkeypatch
) -> None:
    """What they leave kept for the Hessian products, or computed again; three tasks, or one."""
    monkeypatch.setenv("FASTMETA_MEMORY", memory)
    for tasks in (1, 5):
        support, query = data(tasks)
        options = {
            "inner_steps": 3, "inner_lr": 0.1, "loss_fn": LOSSES[loss],
            "step_weights": [0.2, 0.0, 0.5, 1.0],
        }  # fmt: skip
        compare(
            found(network, support, query, chunk, monkeypatch, **options),
            found(network, support, query, "0", monkeypatch, **options),
        )


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize(
    "rule",
    [SGD(momentum=0.9, max_grad_norm=0.5), Adam(eps=0.1, weight_decay=0.1), RMSprop(eps=0.1)],
    ids=["momentum", "adam", "rmsprop"],
)
@pytest.mark.parametrize("engine", ["tasks", "features"])
def test_update_rules(rule: Any, per_step: bool, engine: str, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_ENGINE", engine)
    support, query = data(2, 3 if per_step else 0)
    options: dict[str, Any] = {
        "inner_steps": 3, "inner_optimizer": rule, "prox": 0.3, "per_step_support": per_step,
        "loss_fn": likelihood,
    }  # fmt: skip
    for executor, chunk in (("fused", "0"), ("generic", "")):
        compare(
            found("residual", support, query, "7", monkeypatch, inner_lr=0.1, **options),
            found(
                "residual", support, query, chunk, monkeypatch, executor, inner_lr=0.1, **options
            ),
        )


def test_it_is_told(monkeypatch) -> None:
    support, query = data(4)
    monkeypatch.setenv("FASTMETA_CHUNK", "6")
    told = fastmeta.explain(NETWORKS["residual"]().double(), support, query, loss_fn=F.mse_loss)
    assert "inner loop saved, 6 examples at a time" in told


@pytest.mark.parametrize("first_order", [False, True])
def test_learned_rates(first_order: bool, monkeypatch) -> None:
    support, query = data(3)
    gradients: list[Tensor] = []
    for chunk in ("5", "0"):
        rate = torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)
        monkeypatch.setenv("FASTMETA_CHUNK", chunk)
        torch.manual_seed(3)
        model = NETWORKS["sine"]().double()
        out = fastmeta.maml_step(
            model, support, query, inner_steps=2, inner_lr=rate, loss_fn=F.mse_loss,
            first_order=first_order, executor="fused",
        )  # fmt: skip
        gradients.append(torch.autograd.grad(out.loss, rate)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=0)


def test_ragged_sets(monkeypatch) -> None:
    """Padding counts for nothing, also where the last chunk repeats a part of the one before."""
    support, query = data(4)
    ragged = [
        [(x[i, : n - i], y[i, : n - i]) for i in range(4)]
        for (x, y), n in ((support, SUPPORT), (query, QUERY))
    ]
    options = {"inner_steps": 2, "inner_lr": 0.1, "loss_fn": F.mse_loss}
    whole, chunks = (_gradient(ragged, chunk, monkeypatch, options) for chunk in ("0", "6"))
    torch.testing.assert_close(chunks, whole, rtol=1e-10, atol=1e-14)


def _gradient(
    sets: list[list[Batch]], chunk: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> Tensor:
    monkeypatch.setenv("FASTMETA_CHUNK", chunk)
    torch.manual_seed(3)
    model = NETWORKS["tanh"]().double()
    out = fastmeta.maml_step(model, *sets, executor="fused", **options)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.loss, [*model.parameters()])])


@pytest.mark.parametrize("network", ["sine", "residual"])
def test_threads_change_no_bit(network: str, monkeypatch) -> None:
    """A task's chunks are shared by threads; the parts' sums are added in their order."""
    torch.manual_seed(0)
    x, y = torch.randn(1, 3000, 3), torch.randn(1, 3000, 2)
    monkeypatch.setenv("FASTMETA_CHUNK", "100")
    results: list[list[Tensor]] = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(3)
            model = NETWORKS[network]()
            out = fastmeta.maml_step(
                model, (x, y), (x, y), inner_steps=3, loss_fn=F.mse_loss, executor="fused"
            )
            results.append([out.loss, *torch.autograd.grad(out.loss, [*model.parameters()])])
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_adapted_parameters(monkeypatch) -> None:
    adapted = []
    for chunk in ("5", "0"):
        monkeypatch.setenv("FASTMETA_CHUNK", chunk)
        torch.manual_seed(3)
        model = NETWORKS["sine"]().double()
        torch.manual_seed(4)
        support, _ = data(2)
        adapted.append(fastmeta.adapt(model, support, inner_steps=2, loss_fn=F.mse_loss).parameters)
    for name, tensor in adapted[0].items():
        torch.testing.assert_close(tensor, adapted[1][name], rtol=1e-12, atol=0)


def step(examples: int, tasks: int) -> Any:
    """The kernel of the neural field W7 at so many examples, a set."""
    widths, has = (2, 256, 256, 256, 256, 3), [True, True, False, False]
    layers = [
        (widths[i], widths[i + 1], 3 if i < 4 else 0, 0.0, 0.0, 0, 0.0, has, has,
         (i - 1, NONE, False))
        for i in range(len(widths) - 1)
    ]  # fmt: skip
    return extension().FusedStep(
        layers, 1, 0.0, -100, False, examples, examples, 2, True, False, False, False, 0.0, False,
        tasks, "", "", "", "",
    )  # fmt: skip


@pytest.mark.parametrize("tasks", [1, 4])
def test_storage_does_not_grow_with_the_sets(tasks: int) -> None:
    sizes = [step(examples, tasks).storage_bytes for examples in (1024, 4096, 65536)]
    assert sizes[1] == sizes[2]
    assert max(sizes) < 74 << 20


@pytest.mark.parametrize(
    ("model", "loss_fn"),
    [
        (nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), F.mse_loss),
        (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), F.cross_entropy),
    ],
    ids=["statistics of the set", "a mean over labels"],
)
def test_what_is_of_a_set_as_a_whole(model: nn.Module, loss_fn: Any, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_CHUNK", "6")
    (x, y), _ = data(2)
    support = (x.float(), y.float() if loss_fn is F.mse_loss else y.argmax(-1))
    told = fastmeta.explain(model, support, support, loss_fn=loss_fn)
    assert "lanes over" in told
    assert "at a time" not in told
