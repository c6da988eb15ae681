"""The fused step whose reverse sweep rebuilds the weights: options, storage, choice."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import rates
import torch
import torch.nn.functional as F
from mlps import examples, mlp
from torch import Tensor, nn

import fastmeta

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import ANCHORED, KERNELS, cpu_only

from fastmeta import _C
from fastmeta.executors.fused.lowering import NONE
from fastmeta.plan import snapshot

STEPS = 4
WIDE = (256, 256, 256, 10)


@pytest.fixture(params=ANCHORED)
def kernel(request, monkeypatch) -> str:
    for name, value in {**KERNELS[request.param], "FASTMETA_MEMORY": "reversible"}.items():
        monkeypatch.setenv(name, value)
    return request.param


def network() -> nn.Sequential:
    return mlp(3, 7, 6, 2, activation=nn.Tanh())


def normed(training: bool) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6), nn.BatchNorm1d(6),
        nn.SiLU(), nn.Linear(6, 2),
    ).double()  # fmt: skip
    model(torch.randn(20, 3).double())  # statistics that were written
    return model.train(training)


def agree(
    model: nn.Sequential,
    kind: str = "number",
    steps: int = STEPS,
    adapt: tuple[str, ...] = (),
    tasks: Any = None,
    **options: Any,
) -> None:
    """Losses to 1e-12, gradients to 1e-9; the query loss counts after every step."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if not adapt or n in adapt}
    inner_lr = rates.by_kind(kind, steps, shapes)
    step_weights = torch.linspace(0.5, 1, steps + 1).double()
    support, query = tasks or (examples(5, 4, model, True), examples(5, 6, model, True))
    leaves = [*model.parameters(), *(leaf for leaf in rates.leaves(inner_lr))]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    whole = (
        [(*s, *q) for s, q in zip(support, query, strict=True)]
        if isinstance(support, list)
        else oracle.split(support, query)
    )
    reference = oracle.maml(
        model, whole, leaves, rate=rates.reader(kind, inner_lr), steps=steps,
        adapted=[*shapes], step_weights=step_weights, **options,
    )  # fmt: skip
    out = fastmeta.maml_step(
        model, support, query, inner_lr=inner_lr, inner_steps=steps, adapt=[*shapes],
        step_weights=step_weights, executor="fused", **options,
    )  # fmt: skip
    torch.testing.assert_close(out.task_losses, reference.task_losses, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    for leaf, got, expected in zip(leaves, found, reference.gradients, strict=True):
        got, expected = (torch.zeros_like(leaf) if g is None else g for g in (got, expected))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prox", [0.0, 0.4])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", rates.KINDS)
def test_learning_rates(kind: str, first_order: bool, prox: float, kernel: str) -> None:
    agree(network(), kind, first_order=first_order, prox=prox)


@pytest.mark.parametrize("steps", [0, 1, 2, 20])
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_forms_and_numbers_of_steps(form: str, steps: int, kernel: str, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_FORM", form)
    agree(network(), "per-step" if steps else "number", steps)


@pytest.mark.parametrize("adapt", [("4.weight", "4.bias"), ("0.weight", "2.bias")], ids=str)
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_adapting_a_part(adapt: tuple[str, ...], form: str, kernel: str, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_FORM", form)
    model = network()
    model[0].requires_grad_("0.weight" in adapt)
    agree(model, "layer", adapt=adapt)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["scalar", "element-step"])
def test_batch_norm(kind: str, training: bool, kernel: str) -> None:
    agree(normed(training), kind, prox=0.3)


def test_ragged_tasks(kernel: str) -> None:
    model = network()
    tasks = [
        [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in counts]
        for counts in ((2, 4, 3), (5, 1, 2))
    ]
    agree(model, "layer-step", tasks=tasks)


def gradient(model: nn.Module, data: Any, memory: str, monkeypatch, **options: Any) -> Tensor:
    """The meta-gradient as one row."""
    monkeypatch.setenv("FASTMETA_MEMORY", memory)
    snapshot.clear_cache()  # the environment is looked at once a model
    out = fastmeta.maml_step(model, *data, executor="fused", **options)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.loss, list(model.parameters()))])


@pytest.mark.parametrize("rate", [0.001, 0.1])
def test_float32_is_as_close_as_with_saved_weights(rate: float, kernel: str, monkeypatch) -> None:
    """Each of 20 steps back adds a rounding of the weights."""
    model = network()
    data = examples(5, 4, model, True), examples(5, 6, model, True)
    options = {"inner_lr": rate, "inner_steps": 20}
    exact = gradient(model, data, "saved", monkeypatch, **options)
    single = [(x.float(), y) for x, y in data]
    got = gradient(model.float(), single, "reversible", monkeypatch, **options)
    # Sums of at most 7 terms, 3 layers, 20 steps forward and back, and 20 roundings.
    tolerance = (3 * 2 * 20 * 7**0.5 + 20) * torch.finfo(torch.float32).eps
    assert (got - exact).norm() <= tolerance * exact.norm()


@cpu_only
@pytest.mark.parametrize(
    ("inner_lr", "goes_back"),
    [
        pytest.param(0.1, True, id="mild"),
        # A step back would double every error: seven of them cost two digits.
        pytest.param(0.5, False, id="many-halves"),
        pytest.param([0.1, 0.1, 0.1, 1.0, 0.1, 0.1, 0.1, 0.1], False, id="singular"),
        # Step 0 is not gone back.
        pytest.param([1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], True, id="singular-at-first"),
    ],
)
def test_weights_are_saved_where_prox_would_magnify(
    inner_lr: Any, goes_back: bool, kernel: str, monkeypatch
) -> None:
    model = network()
    data = examples(5, 4, model, True), examples(5, 6, model, True)
    rate = torch.tensor(inner_lr).double() if isinstance(inner_lr, list) else inner_lr
    options = {"inner_lr": rate, "inner_steps": 8, "prox": 1.0}
    saved, reversible = (
        gradient(model, data, memory, monkeypatch, **options) for memory in ("saved", "reversible")
    )
    torch.testing.assert_close(reversible, saved, rtol=1e-9, atol=1e-12)
    assert torch.equal(saved, reversible) != goes_back


@cpu_only
def test_one_element_is_enough(kernel: str, monkeypatch) -> None:
    model = network()
    data = examples(5, 4, model, True), examples(5, 6, model, True)
    inner_lr = {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()}
    options = {"inner_lr": inner_lr, "inner_steps": 3, "prox": 1.0}
    results = []
    for singular in (False, True):
        if singular:
            inner_lr["2.weight"][5, 6] = 1.0
        results.append([
            gradient(model, data, memory, monkeypatch, **options)
            for memory in ("saved", "reversible")
        ])  # fmt: skip
    (saved, reversible), (with_singular, with_singular_too) = results
    assert not torch.equal(saved, reversible)
    assert torch.equal(with_singular, with_singular_too)


def step(
    widths: tuple[int, ...],
    steps: int,
    memory: str = "",
    *,
    support: int = 5,
    first_order: bool = False,
    elementwise: bool = False,
    learned: bool = False,
    prox: float = 0.0,
    form: str = "primal",
) -> _C.FusedStep:
    """A kernel over features, float32."""
    has = [True, True, False, False]
    layers = [
        (widths[i], widths[i + 1], 0, 0.0, 0.0, 0, 0.0, has, has, (i - 1, NONE, False))
        for i in range(len(widths) - 1)
    ]
    return _C.FusedStep(
        layers, 1, 0.0, -100, False, support, 5, steps, True, first_order, elementwise, learned,
        prox, False, 4, "", "features", form, memory,
    )  # fmt: skip


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_storage_grows_by_activations_alone(form: str, learned: bool) -> None:
    def grown(memory: str) -> int:
        few, many = (
            step(WIDE, k, memory, form=form, learned=learned).storage_bytes for k in (2, 12)
        )
        return (many - few) // 10

    # Activations and deltas [5, H] of a step, and S_k in dual form; rows are padded.
    each = 4 * 5 * 2 * sum(2 * width for width in WIDE[1:])
    assert grown("reversible") <= each
    kept = WIDE[form == "dual" :]
    weights = 4 * sum(a * b for a, b in itertools.pairwise(kept))
    assert grown("saved") >= grown("reversible") + weights


def test_first_order_keeps_nothing_of_the_steps() -> None:
    few, many = (step(WIDE, k, first_order=True) for k in (1, 20))
    assert many.memory == "forward"
    assert many.storage_bytes == few.storage_bytes
    assert step(WIDE, 20, first_order=True, learned=True).storage_bytes > many.storage_bytes


def test_wide_layers_few_examples_and_many_steps_go_back() -> None:
    if _C.instruction_sets() == ["plain"]:
        pytest.skip("there are no lanes here")
    assert step(WIDE, 20).memory == "reversible"
    assert step(WIDE, 20, "saved").memory == "saved"
    for other in (
        step(WIDE, 2), step(WIDE, 20, support=50), step((64, 64, 64, 10), 20),
        step((1024, 1024, 1024, 10), 20), step(WIDE, 20, elementwise=True),
        step(WIDE, 20, prox=0.1),
    ):  # fmt: skip
        assert other.memory == "saved"


def test_a_way_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_MEMORY", "elephant")
    data = [(torch.randn(2, 4, 3), torch.randint(2, (2, 4))) for _ in range(2)]
    with pytest.raises(ValueError, match="FASTMETA_MEMORY: 'elephant'"):
        fastmeta.maml_step(nn.Linear(3, 2), *data, executor="fused")


def explained(tasks: int, count: int, steps: int, **options: Any) -> str:
    model = mlp(1, 40, 40, 1, activation=nn.ReLU()).float()
    data = [tuple(t.float() for t in examples(tasks, count, model, False)) for _ in "sq"]
    return fastmeta.explain(model, *data, inner_steps=steps, loss_fn=F.mse_loss, **options)


def test_low_memory_goes_back() -> None:
    assert "inner loop reversible" in explained(25, 10, 10, memory="low")
    assert "inner loop saved" in explained(25, 10, 10)


@cpu_only
def test_low_memory_is_left_to_the_sweep_where_activations_would_grow(monkeypatch) -> None:
    # 16 tasks at a time, 81 activations and deltas of 500 examples: 5 MB a step.
    monkeypatch.setenv("FASTMETA_ENGINE", "tasks")
    text = explained(25, 500, 10, memory="low")
    assert "executor: generic" in text
    assert "form: sweep" in text
    assert "executor: fused" in explained(25, 500, 10)
    assert "executor: fused" in explained(25, 500, 1, memory="low")
