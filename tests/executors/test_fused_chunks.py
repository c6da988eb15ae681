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


def step(
    examples: int, tasks: int, loss: int = 1, first: int = 2, fixed: int = 0, flows: bool = False
) -> Any:
    """The kernel of the neural field W7 at so many examples, a set, and `fixed` first layers."""
    widths, has = (first, 256, 256, 256, 256, 3), [True, True, False, False]
    layers = [
        (widths[i], widths[i + 1], 3 if i < 4 else 0, 0.0, 0.0, 0, 0.0, has,
         has if i >= fixed else [False] * 4, (i - 1, NONE, False))
        for i in range(len(widths) - 1)
    ]  # fmt: skip
    return extension().FusedStep(
        layers, loss, 0.0, -100, False, examples, examples, 2, True, False, False, False, 0.0,
        False, tasks, "", "", "", "", inputs_flow=flows,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"loss": 0}, {"flows": True}], ids=str)
@pytest.mark.parametrize("tasks", [1, 4])
def test_storage_does_not_grow_with_the_sets(tasks: int, options: dict[str, Any]) -> None:
    sizes = [step(examples, tasks, **options).storage_bytes for examples in (1024, 4096, 65536)]
    assert sizes[1] == sizes[2]
    assert max(sizes) < 74 << 20


@pytest.mark.parametrize("options", [{"fixed": 4}, {"first": 40_000}], ids=["body", "dual form"])
def test_what_saves_work_gives_way_to_storage(options: dict[str, Any]) -> None:
    short, long, longer = (step(examples, 4, **options) for examples in (100, 65536, 131072))
    assert (short.body, short.form, short.chunk > 0) == (
        options.get("fixed", 0), "dual" if "first" in options else "primal", False
    )  # fmt: skip
    assert (long.body, long.form, long.chunk > 0) == (0, "primal", True)
    assert longer.storage_bytes <= long.storage_bytes


LABELS: dict[str, nn.CrossEntropyLoss] = {
    "plain": nn.CrossEntropyLoss(),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "of weighted classes": nn.CrossEntropyLoss(weight=torch.tensor([0.3, 0.0, 1.7]).double()),
    "both": nn.CrossEntropyLoss(weight=torch.tensor([0.3, 2.0, 0.0]).double(), label_smoothing=0.2),
}


def classified(tasks: int, steps: int = 0) -> tuple[Batch, Batch]:
    """Sets of which some labels, a whole chunk's among them, are ignored or weigh nothing."""

    def drawn(*front: int) -> Batch:
        y = torch.randint(3, front)
        y[..., ::4], y[..., :8] = -100, 1
        return torch.randn(*front, 3).double(), y

    return drawn(tasks, *((steps,) if steps else ()), SUPPORT), drawn(tasks, QUERY)


def classifier() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3)
    ).double()


def classify(
    sets: Any, loss: nn.Module, chunk: str, monkeypatch: pytest.MonkeyPatch,
    model: nn.Module | None = None, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Losses, outputs, and the gradients of a new classifier's parameters."""
    monkeypatch.setenv("FASTMETA_CHUNK", chunk)
    model = classifier() if model is None else model
    options |= {
        "inner_steps": 3, "inner_lr": 0.2, "loss_fn": loss, "executor": "fused",
        "step_weights": [0.2, 0.0, 0.5, 1.0],
    }  # fmt: skip
    assert ("at a time" in fastmeta.explain(model, *sets, **options)) == (chunk != "0")
    out = fastmeta.maml_step(model, *sets, **options)
    gradients = torch.autograd.grad(out.loss, [*model.parameters()])
    return [out.task_losses, out.support_losses, *out.query_outputs, *gradients]


@pytest.mark.parametrize("engine", ["tasks", "features"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("loss", LABELS)
def test_labels(loss: str, per_step: bool, engine: str, monkeypatch) -> None:
    """The mean is over the labels of the whole set, however they fall into chunks."""
    monkeypatch.setenv("FASTMETA_ENGINE", engine)
    for tasks in (1, 5):
        sets = classified(tasks, 3 if per_step else 0)
        whole, *chunks = (
            classify(sets, LABELS[loss], chunk, monkeypatch, per_step_support=per_step)
            for chunk in ("0", "1", "4", "16")
        )
        for each in chunks:
            compare(each, whole)


def test_ragged_labels(monkeypatch) -> None:
    support, query = classified(4)
    ragged = [
        [(x[i, : n - i], y[i, : n - i]) for i in range(4)]
        for (x, y), n in ((support, SUPPORT), (query, QUERY))
    ]
    whole, chunks = (
        classify(ragged, LABELS["of weighted classes"], chunk, monkeypatch)[4:]
        for chunk in ("0", "6")
    )
    gradients = slice(-6, None)
    compare(chunks[gradients], whole[gradients])


def test_a_set_without_a_label(monkeypatch) -> None:
    """Torch's mean of nothing is no number; its derivatives are zero."""
    (x, y), query = classified(2)
    y[0] = -100
    losses = classify(((x, y), query), LABELS["plain"], "4", monkeypatch)
    whole = classify(((x, y), query), LABELS["plain"], "0", monkeypatch)
    assert losses[1][:, 0].isnan().all()
    for ours, theirs in zip(losses, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("memory", ["saved", "reversible"])
@pytest.mark.parametrize("adapted", [["4"], ["2", "4.bias"]], ids=["head", "middle"])
def test_a_body_runs_at_every_step(
    adapted: list[str], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not adapt goes through with the rest of a chunk, at the numbers of one pass."""
    monkeypatch.setenv("FASTMETA_MEMORY", memory)
    sets = classified(3)
    whole, chunks = (
        classify(sets, LABELS["plain"], chunk, monkeypatch, adapt=adapted) for chunk in ("0", "5")
    )
    compare(chunks, whole)


@pytest.mark.parametrize("adapted", [None, ["2", "4"]], ids=["all", "head"])
def test_the_dual_form_gives_way(adapted: list[str] | None, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_FORM", "dual")
    sets = classified(3)
    kept = fastmeta.explain(classifier(), *sets, loss_fn=LABELS["plain"], adapt=adapted)
    monkeypatch.setenv("FASTMETA_CHUNK", "5")
    forced = fastmeta.explain(classifier(), *sets, loss_fn=LABELS["plain"], adapt=adapted)
    assert "dual" in kept
    assert "dual" in forced
    monkeypatch.delenv("FASTMETA_FORM")
    whole, chunks = (
        classify(sets, LABELS["plain"], chunk, monkeypatch, adapt=adapted) for chunk in ("0", "5")
    )
    compare(chunks, whole)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("memory", ["saved", "reversible"])
@pytest.mark.parametrize("tasks", [1, 5])
def test_gradients_by_the_inputs(tasks: int, memory: str, per_step: bool, monkeypatch) -> None:
    """They are summed over the passes of each chunk, by the weights of the tasks."""
    monkeypatch.setenv("FASTMETA_MEMORY", memory)
    (x, y), (query_x, query_y) = classified(tasks, 3 if per_step else 0)
    weights = torch.rand(tasks).double()
    found: list[list[Tensor]] = []
    for chunk in ("0", "1", "5"):
        monkeypatch.setenv("FASTMETA_CHUNK", chunk)
        inputs = [x.clone().requires_grad_(), query_x.clone().requires_grad_()]
        out = fastmeta.maml_step(
            classifier(), (inputs[0], y), (inputs[1], query_y), inner_steps=3, inner_lr=0.2,
            task_weights=weights, step_weights=[0.2, 0.0, 0.5, 1.0], per_step_support=per_step,
            loss_fn=LABELS["smoothed"], executor="fused",
        )  # fmt: skip
        found.append([*torch.autograd.grad(out.loss, inputs)])
    compare(found[1], found[0])
    compare(found[2], found[0])


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = classifier()
        self.table = nn.Embedding(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.table(x))


def test_a_front(monkeypatch) -> None:
    """Its gradient comes back through the inputs of the chunks."""
    (_, y), (_, query_y) = classified(3)
    sets = (torch.randint(7, y.shape), y), (torch.randint(7, query_y.shape), query_y)
    adapted = ["layers"]
    whole, chunks = (
        classify(sets, LABELS["plain"], chunk, monkeypatch, Embedded().double(), adapt=adapted)
        for chunk in ("0", "6")
    )
    compare(chunks, whole)


def test_statistics_of_a_set_are_of_it_as_a_whole(monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_CHUNK", "6")
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    told = fastmeta.explain(model, *data(2), loss_fn=F.mse_loss)
    assert "lanes over" in told
    assert "at a time" not in told
