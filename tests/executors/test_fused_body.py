"""The layers in front of the first that adapts, which the fused step runs once."""

from __future__ import annotations

import copy
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
from fastmeta.executors.extension import extension
from fastmeta.executors.fused.lowering import NONE

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import ANCHORED, FUSED, KERNELS

WIDTHS = (3, 6, 7, 5, 4)
LAYERS = len(WIDTHS) - 1


@pytest.fixture(params=ANCHORED)
def kernel(request, monkeypatch) -> str:
    for name, value in KERNELS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.fixture(params=["primal", "dual"])
def form(request, monkeypatch) -> str:
    monkeypatch.setenv("FASTMETA_FORM", request.param)
    return request.param


def after(body: int, model: nn.Sequential) -> list[str]:
    """The names of what adapts where so many linear layers, and their norms, do not."""
    linear = [i for i, layer in enumerate(model) if isinstance(layer, nn.Linear)]
    named = model.named_parameters()
    return [name for name, _ in named if int(name.split(".")[0]) >= linear[body]]


def normed() -> nn.Sequential:
    """Batch norm in every layer but the last, in body and head."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs, 0.1), nn.GELU()]
    return nn.Sequential(*layers[:-2]).double()


def agrees(
    model: nn.Sequential, names: list[str], steps: int, leaves: tuple[Tensor, ...] = (),
    rate: Any = None, inner_lr: Any = 0.2, tasks: int = 5, **options: Any,
) -> None:  # fmt: skip
    """Everything that a step gives, to 1e-9 of the oracle's in float64."""
    data = [examples(tasks, count, model, True) for count in (4, 6)]
    wanted = [*model.parameters(), *leaves]
    reference = oracle.maml(
        model, oracle.split(*data), wanted, rate=rate or (lambda name, step: 0.2), steps=steps,
        adapted=names, **options,
    )  # fmt: skip
    out = fastmeta.maml_step(
        model, *data, inner_lr=inner_lr, inner_steps=steps, adapt=names, executor="fused", **options
    )
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(out.task_losses, reference.task_losses, **close)
    if steps:
        losses = torch.stack([torch.stack(each) for each in reference.support_losses], dim=1)
        torch.testing.assert_close(out.support_losses, losses, **close)
    outputs = torch.stack(reference.query_outputs).detach()
    torch.testing.assert_close(out.query_outputs, outputs, **close)
    gradients = torch.autograd.grad(out.loss, wanted, allow_unused=True)
    for leaf, got, expected in zip(wanted, gradients, reference.gradients, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if got is None else got, zero if expected is None else expected, **close
        )


@pytest.mark.parametrize("first_order", [False, True], ids=["second-order", "first-order"])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("body", range(LAYERS))
@pytest.mark.usefixtures("kernel", "form")
def test_bodies(body: int, steps: int, first_order: bool) -> None:
    model = mlp(*WIDTHS, activation=nn.Tanh())
    agrees(model, after(body, model), steps, first_order=first_order)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("body", range(LAYERS))
@pytest.mark.usefixtures("kernel", "form")
def test_batch_norm(body: int, steps: int) -> None:
    model = normed()
    agrees(model, after(body, model), steps)


@pytest.mark.parametrize("body", [1, LAYERS - 1])
@pytest.mark.usefixtures("kernel", "form")
def test_every_step_has_its_query_loss(body: int) -> None:
    model = normed()
    weights = torch.tensor([0.5, 0.0, 0.3, 0.7], dtype=torch.float64, requires_grad=True)
    agrees(model, after(body, model), 3, (weights,), step_weights=weights)


@pytest.mark.parametrize("prox", [0.0, 0.4])
@pytest.mark.parametrize("kind", rates.KINDS)
@pytest.mark.parametrize("body", [1, LAYERS - 1])
@pytest.mark.usefixtures("kernel", "form")
def test_learned_rates(body: int, kind: str, prox: float) -> None:
    model = mlp(*WIDTHS, activation=nn.Softplus())
    names = after(body, model)
    inner_lr = rates.by_kind(
        kind, 3, {name: tuple(model.get_parameter(name).shape) for name in names}
    )
    agrees(
        model, names, 3, tuple(rates.leaves(inner_lr)), rates.reader(kind, inner_lr), inner_lr,
        prox=prox,
    )  # fmt: skip


@pytest.mark.parametrize("part", ["2.bias", "4.weight"])
@pytest.mark.usefixtures("kernel", "form")
def test_one_tensor_alone_adapts(part: str) -> None:
    """In front of it and after it there are layers that do not."""
    model = mlp(*WIDTHS, activation=nn.Tanh())
    agrees(model, [part], 3, prox=0.3)


@pytest.mark.usefixtures("kernel", "form")
def test_tasks_that_fill_no_vector_and_no_group() -> None:
    model = mlp(*WIDTHS, activation=nn.Tanh())
    agrees(model, after(2, model), 2, tasks=35)


@pytest.mark.parametrize("body", [1, LAYERS - 1])
@pytest.mark.usefixtures("kernel")
def test_ragged_tasks_and_adapt(body: int, force_form) -> None:
    force_form("fused")
    model = mlp(*WIDTHS, activation=nn.Tanh())
    names = after(body, model)
    pairs = [
        [(torch.randn(n, 3).double(), torch.randint(4, (n,))) for n in counts]
        for counts in ((2, 4, 3), (5, 1, 2))
    ]
    tasks = [(*s, *q) for s, q in zip(*pairs, strict=True)]
    leaves = list(model.parameters())
    reference = oracle.maml(model, tasks, leaves, rate=lambda *_: 0.2, steps=3, adapted=names)
    out = fastmeta.maml_step(model, *pairs, inner_lr=0.2, inner_steps=3, adapt=names)
    assert out.executor == FUSED
    gradients = torch.autograd.grad(out.loss, leaves)
    for got, expected in zip(gradients, reference.gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)

    support = examples(3, 4, model, True)
    adapted = fastmeta.adapt(model, support, inner_lr=0.2, inner_steps=3, adapt=names)
    force_form("loop")
    expected = fastmeta.adapt(model, support, inner_lr=0.2, inner_steps=3, adapt=names)
    for name, tensor in expected.parameters.items():
        torch.testing.assert_close(adapted.parameters[name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("kernel")
def test_float32_is_as_close_as_its_rounding_allows() -> None:
    model = mlp(40, 40, 40, 4, activation=nn.Tanh())
    data = [examples(9, n, model, True) for n in (5, 15)]
    names = after(2, model)
    leaves = list(model.parameters())
    exact = oracle.maml(
        model, oracle.split(*data), leaves, rate=lambda *_: 0.1, steps=5, adapted=names
    )
    single = copy.deepcopy(model).float()
    out = fastmeta.maml_step(
        single, *[(x.float(), y) for x, y in data], inner_lr=0.1, inner_steps=5, adapt=names,
        executor="fused",
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, list(single.parameters()))
    # Sums of at most 40 terms, 3 layers, 5 steps forward and back.
    tolerance = 3 * 2 * 5 * 40**0.5 * torch.finfo(torch.float32).eps
    for got, wanted in zip(gradients, exact.gradients, strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()


def step(widths: tuple[int, ...], body: int, steps: int = 5, form: str = "primal") -> Any:
    """The compiled step of so many second-order steps; without them, of as many layers adapting."""
    has = [True, True, False, False]
    layers = [
        (
            widths[i],
            widths[i + 1],
            0,
            0.0,
            0.0,
            0,
            0.0,
            has,
            has if i >= body else [False] * 4,
            (i - 1, NONE, False),
        )
        for i in range(len(widths) - 1)
    ]
    flags = (True, False, False, False)
    return extension().FusedStep(
        layers,
        1,
        0.0,
        -100,
        False,
        10,
        10,
        steps,
        *flags,
        0.0,
        False,
        8,
        "",
        "features",
        form,
        "saved",
    )


def test_inner_steps_keep_nothing_of_the_body() -> None:
    """Neither its activations nor its weights: a step more takes as much with any body."""
    narrow, wide = (
        step((3, *widths, 40, 2), 2, 6).storage_bytes
        - step((3, *widths, 40, 2), 2, 1).storage_bytes
        for widths in ((16,), (512,))
    )
    assert narrow == wide > 0


def test_inner_steps_are_not_estimated_to_run_the_body() -> None:
    more = [
        step((3, width, 40, 2), 2, 6).seconds - step((3, width, 40, 2), 2, 1).seconds
        for width in (16, 512)
    ]
    assert more[0] == pytest.approx(more[1]) != 0
    assert step((3, 512, 40, 2), 2).seconds < step((3, 512, 40, 2), 0).seconds / 3


def test_the_body_ends_before_the_first_layer_that_adapts() -> None:
    for body in range(3):
        assert step((3, 5, 5, 2), body).body == body
    # The last layer is none of it, whatever adapts.
    assert step((3, 5, 5, 2), 3).body == 2


def test_a_wide_first_layer_of_the_body_is_taken_in_dual_form() -> None:
    assert step((784, 64, 10), 1, form="").form == "dual"
    assert step((16, 64, 10), 1, form="").form == "primal"


def test_explain_counts_the_body_once() -> None:
    model = mlp(3, 6, 7, activation=nn.Tanh())
    data = [examples(2, count, model, True) for count in (4, 5)]
    body, head = 2 * 3 * 6, 2 * 6 * 7

    def text(**options: Any) -> str:
        return fastmeta.explain(model, *data, inner_steps=3, executor="fused", **options)

    whole = 2 * (body + head) * (9 * 3 * 4 + 3 * 5)
    assert f"arithmetic: {whole:,} FLOP" in text()
    once = whole - 2 * body * (9 * 3 * 4 - 3 * 4)
    assert f"arithmetic: {once:,} FLOP" in text(adapt=["2.weight"])
    first_order = 2 * (body * (4 + 3 * 5) + head * (3 * 3 * 4 + 3 * 5))
    assert f"arithmetic: {first_order:,} FLOP" in text(adapt=["2.weight"], first_order=True)


def test_where_nothing_adapts_all_losses_are_alike() -> None:
    """The public face refuses it; the compiled step does not."""
    tasks, count, widths = 8, 10, (3, 5, 2)
    tensors = [
        t for i, o in itertools.pairwise(widths) for t in (torch.randn(o, i), torch.randn(o))
    ]
    addresses = [t.data_ptr() for t in tensors]
    compiled = step(widths, 2)
    sets = [(torch.randn(tasks, count, 3), torch.randn(tasks, count, 2)) for _ in "sq"]
    rate = torch.full((5, 8), 0.1)
    weights = torch.full((tasks,), 1 / tasks)
    support_losses, step_losses = torch.full((5, tasks), torch.nan), torch.zeros(6, tasks)
    outputs, gradient = torch.empty(tasks, count, 2), torch.empty(compiled.gradients)
    compiled.run(
        tasks,
        [*addresses[:2], 0, 0, *addresses[2:], 0, 0], [], [0] * 4, rate.data_ptr(),
        [0.0] * 5 + [1.0], [False] * 5 + [True], weights.data_ptr(),
        *([x.data_ptr(), y.data_ptr(), 0, 0, 0] for x, y in sets),
        support_losses.data_ptr(), step_losses.data_ptr(), outputs.data_ptr(),
        gradient.data_ptr(), 1,
    )  # fmt: skip
    leaves = [t.double().requires_grad_() for t in tensors]

    def losses(x: Tensor, y: Tensor) -> Tensor:
        z = F.linear(F.linear(x.double(), *leaves[:2]), *leaves[2:])
        return (z - y).square().mean((1, 2))

    expected = losses(*sets[0]).detach().float().expand(5, tasks)
    torch.testing.assert_close(support_losses, expected, rtol=1e-5, atol=1e-6)
    exact = torch.autograd.grad(losses(*sets[1]).mean(), leaves)
    flat = torch.cat([g.flatten() for g in exact]).float()
    torch.testing.assert_close(gradient, flat, rtol=1e-5, atol=1e-5)
