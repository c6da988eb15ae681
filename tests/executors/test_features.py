"""Features kept on the general path: the body runs once a task and set, and the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.plan import snapshot

TASKS, STEPS, RATE = 3, 3, 0.3
FORMS = ("loop", "sweep", "vmap")
CALLS = 3
"""The first plans and tries; an LSTM's looks change with its first pass, so the second does too."""
RUNS: list[str] = []
"""The bodies that have run since a test cleared it."""


class Counted(nn.Module):
    """Says when it runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        RUNS.append("body")
        return self.inner(*args)


class Sequential(nn.Module):
    """`head(body(x))`, with the body of a batch norm, whose statistics are the set's."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ELU(inplace=True))
        self.body, self.head = Counted(body), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Written(Sequential):
    """A forward of functions between modules, a buffer, and a parameter beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(5, 5), nn.Parameter(torch.randn(5))
        self.register_buffer("shift", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x.view(len(x), -1))) * self.scale + self.shift
        return self.head(torch.tanh(self.body(h)).clamp(max=0.9))


class Convolutional(nn.Module):
    """Group norm over `[N, 5]` seen as a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Counted(nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.unsqueeze(1)).mean(2))


class Recurrent(nn.Module):
    """A body that gives a nest of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Counted(nn.LSTM(1, 4, batch_first=True)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        output, (state, _) = self.body(x.unsqueeze(2))
        return self.head(output.mean(1) + state[-1])


class Attending(nn.Module):
    """A transformer's encoder with positions, and two heads, of which one reads the other."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(1, 4)
        self.body = Counted(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self.register_buffer("positions", torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.embed(x.unsqueeze(2)) + self.positions)
        return self.head(h[:, 0]) + h.mean(1)[:, :3]


class Tied(nn.Module):
    """Two layers of the body share a weight."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(5, 5), nn.Linear(5, 5)
        second.weight = first.weight
        self.body = Counted(nn.Sequential(first, nn.Tanh(), second, nn.Tanh()))
        self.head = nn.Linear(5, 3)
        self.aside = first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + self.aside(x))


KEPT = {
    "batch-norm": Sequential, "functions": Written, "group-norm": Convolutional,
    "lstm": Recurrent, "encoder": Attending, "tied": Tied,
}  # fmt: skip


def _data(count: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(TASKS, count, 5).double(), torch.randint(3, (TASKS, count))


def _agrees(
    model: nn.Module, support: Any, query: Any, *also: Tensor, adapt: str = "head", **options: Any
) -> fastmeta.MetaStep:
    """Loss and all gradients are the oracle's, to float64's rounding in some hundred operators."""
    leaves = [*(p for p in model.parameters() if p.requires_grad), *also]
    names = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(adapt)]
    steps = options.pop("inner_steps", STEPS)
    expected = oracle.maml(
        model, oracle.split(support, query), leaves, rate=lambda name, step: RATE, steps=steps,
        adapted=names, **options,
    )  # fmt: skip
    for _ in range(CALLS):
        RUNS.clear()
        out = fastmeta.maml_step(
            model, support, query, inner_lr=RATE, inner_steps=steps, adapt=adapt,
            executor="generic", **options,
        )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    torch.testing.assert_close(out.task_losses, expected.task_losses, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(gradients, expected.gradients, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if got is None else got, zero if wanted is None else wanted,
            rtol=1e-9, atol=1e-12,
        )  # fmt: skip
    return out


def _passes(form: str) -> int:
    """Of the body, where its features are kept; under vmap two tasks run at a time."""
    return 2 * (-(-TASKS // 2) if form == "vmap" else TASKS)


@pytest.mark.parametrize("options", [
    {}, {"first_order": True}, {"prox": 0.2, "step_weights": [0.1, 0.2, 0.0, 0.7]},
    {"inner_steps": 0},
], ids=["second", "first", "every-step", "no-step"])  # fmt: skip
@pytest.mark.parametrize(
    ("network", "form"),
    # torch has no batching rule for an LSTM.
    [(n, f) for n in KEPT for f in FORMS if (n, f) != ("lstm", "vmap")],
)
def test_the_body_runs_once_a_task_and_set(
    network: str, form: str, options: dict[str, Any], force_form
) -> None:
    force_form(form)
    _agrees(KEPT[network]().double(), _data(), _data(6), **options)
    if options.get("inner_steps") == 0:
        assert len(RUNS) == _passes(form) // 2  # the query set alone
    else:
        assert len(RUNS) == _passes(form)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_get_their_gradient_through_the_body(form: str, force_form) -> None:
    force_form(form)
    (sx, sy), (qx, qy) = _data(), _data(6)
    sx, qx = sx.requires_grad_(), qx.requires_grad_()
    _agrees(Written().double(), (sx, sy), (qx, qy), sx, qx)
    assert len(RUNS) == _passes(form)


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_body_runs_once_too(form: str, force_form) -> None:
    force_form(form)
    model = Written().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    _agrees(model, _data(), _data(6))
    assert len(RUNS) == _passes(form)


def test_tasks_of_different_sizes_keep_theirs(force_form) -> None:
    force_form("loop")
    model = Recurrent().double()
    sets = [
        [(torch.randn(n, 5).double(), torch.randint(3, (n,))) for n in counts]
        for counts in ((4, 3, 4), (6, 6, 5))
    ]
    options = {"inner_lr": RATE, "inner_steps": STEPS, "adapt": "head", "executor": "generic"}
    for _ in range(CALLS):
        RUNS.clear()
        out = fastmeta.maml_step(model, *sets, **options)
    assert len(RUNS) == 2 * TASKS
    leaves = [*model.parameters()]
    expected = oracle.maml(
        model, [(*s, *q) for s, q in zip(*sets, strict=True)], leaves,
        rate=lambda name, step: RATE, steps=STEPS, adapted=["head.weight", "head.bias"],
    )  # fmt: skip
    found = torch.autograd.grad(out.loss, leaves)
    torch.testing.assert_close(found, tuple(expected.gradients), rtol=1e-9, atol=1e-12)


def test_adaptation_alone_keeps_them() -> None:
    model, (x, y) = Recurrent().double(), _data()
    options = {"inner_lr": RATE, "inner_steps": STEPS, "adapt": "head", "executor": "generic"}
    for _ in range(CALLS):
        RUNS.clear()
        tasks = fastmeta.adapt(model, (x, y), **options)
    assert len(RUNS) == TASKS
    for i in range(TASKS):
        phi = {name: p.detach() for name, p in model.named_parameters()}
        for _ in range(STEPS):
            moving = {n: p.requires_grad_() for n, p in phi.items() if n.startswith("head")}
            loss = F.cross_entropy(oracle.call(model, phi, x[i]), y[i])
            found = torch.autograd.grad(loss, [*moving.values()])
            phi |= {
                n: (p - RATE * g).detach() for (n, p), g in zip(moving.items(), found, strict=True)
            }
        torch.testing.assert_close(tasks.parameters["head.weight"][i], phi["head.weight"])


class Dropping(Recurrent):
    """Dropout in front of the head alone, or in the body."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.drop = where, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "body":
            x = self.drop(x)
        _, (state, _) = self.body(x.unsqueeze(2))
        return self.head(self.drop(state[-1]) if self.where == "head" else state[-1])


@pytest.mark.parametrize("form", ["loop", "sweep"])
@pytest.mark.parametrize("where", ["head", "body"])
def test_dropout_draws_at_every_pass(where: str, form: str, force_form, monkeypatch) -> None:
    force_form(form)
    model, support, query = Dropping(where).double(), _data(), _data(6)

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        RUNS.clear()
        out = fastmeta.maml_step(
            model, support, query, inner_lr=RATE, inner_steps=STEPS, adapt="head",
            executor="generic",
        )  # fmt: skip
        return torch.autograd.grad(out.loss, [*model.parameters()])

    for _ in range(CALLS):
        found = gradients()
    runs = len(RUNS)
    snapshot.clear_cache()
    monkeypatch.setattr("fastmeta.executors.generic.forms.worth_keeping", lambda *_: False)
    torch.testing.assert_close(found, gradients(), rtol=1e-9, atol=1e-12)
    kept = 2 * TASKS
    assert (runs == kept) == (where == "head"), runs
    assert len(RUNS) > kept


class Stashing(Sequential):
    """The head reads what the body left behind in a list."""

    def __init__(self) -> None:
        super().__init__()
        stash: list[Tensor] = [torch.zeros(())]

        class Leaving(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                stash[0] = x.mean()
                return super().forward(x)

        self.body, self.stash = Counted(Leaving(5, 6)), stash

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.stash[0]


class Peeking(Sequential):
    """The body reads an adapted parameter that is none of its own."""

    def __init__(self) -> None:
        super().__init__()
        head = self.head

        class Reading(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * head.bias.exp().mean()

        self.body = Counted(Reading(5, 6))


class InPlace(Sequential):
    """A module of the body writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.relu = Counted(nn.Linear(5, 6)), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.body(x)))


class WrittenByHead(Sequential):
    """What adapts writes into the features."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x) + 1).mul_(self.head.bias.mean().exp()))


class Hooked(Sequential):
    """A hook on the gradient of the features."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x) * 1.0
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient.clamp(max=0.01))
        return self.head(features)


class Returning(Sequential):
    """The body gives an object of its own."""

    def __init__(self) -> None:
        super().__init__()

        class Box:
            def __init__(self, value: Tensor) -> None:
                self.value = value

        class Boxing(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return Box(super().forward(x))

        self.body = Counted(Boxing(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).value)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Stashing, "what it gives changes from pass to pass"),
        (Peeking, "reads one of them"),
        (InPlace, "writes to its input in place"),
        (WrittenByHead, "in-place"),
        (Hooked, "register_hook"),
        (Returning, "returns a Box"),
    ],
)
def test_a_body_that_is_no_function_runs_at_every_pass(
    make: Callable[[], nn.Module], why: str, force_form
) -> None:
    force_form("loop")
    model, support, query = make().double(), _data(), _data(6)
    _agrees(model, support, query, step_weights=[0.1, 0.2, 0.3, 0.4])
    assert len(RUNS) > 2 * TASKS
    text = fastmeta.explain(
        model, support, query, adapt="head", inner_lr=RATE, inner_steps=STEPS,
        step_weights=[0.1, 0.2, 0.3, 0.4], executor="generic",
    )  # fmt: skip
    assert why in text.partition("run at every pass: ")[2]


def test_a_hook_runs_at_every_pass() -> None:
    model, seen = Sequential().double(), []
    model.body.inner[0].register_forward_hook(lambda module, args, output: seen.append(1))
    _agrees(model, _data(), _data(6))
    assert len(RUNS) > 2 * TASKS
    assert len(seen) >= len(RUNS)


def test_features_are_kept_again_after_eval_and_back() -> None:
    model, data = Sequential().double(), (_data(), _data(6))

    def bodies() -> int:
        """The bodies that run in a step, once it is planned."""
        for _ in range(CALLS):
            RUNS.clear()
            fastmeta.maml_step(
                model, *data, adapt="head", inner_lr=RATE, inner_steps=STEPS, executor="generic"
            )
        return len(RUNS)

    model.body.inner[1].num_batches_tracked.add_(1)
    training = bodies()
    model.eval()
    evaluating = bodies()
    model.train()
    assert training == evaluating == bodies() <= 2 * TASKS


def test_what_changes_after_the_trial_is_run_as_it_stands() -> None:
    """The way is verified on the first tasks; later data may lead the forward elsewhere."""

    class Branching(Sequential):
        def forward(self, x: Tensor) -> Tensor:
            features = self.body(x) + 1
            if x.max() > 100:
                features.mul_(2)
            return self.head(features)

    model, support, query = Branching().double(), _data(), _data(6)
    _agrees(model, support, query)
    assert len(RUNS) == 2 * TASKS
    query[0][1] *= 1000
    _agrees(model, support, query)


def test_a_tensor_of_the_closure_gets_its_gradient_through_the_body() -> None:
    outside = torch.randn(6, dtype=torch.float64, requires_grad=True)

    class Reaching(Sequential):
        def __init__(self) -> None:
            super().__init__()

            class Shifted(nn.Linear):
                def forward(self, x: Tensor) -> Tensor:
                    return super().forward(x) + outside

            self.body = Counted(Shifted(5, 6))

    _agrees(Reaching().double(), _data(), _data(6), outside)
    assert len(RUNS) == 2 * TASKS


def test_where_the_body_adapts_nothing_is_kept() -> None:
    model, support, query = Sequential().double(), _data(), _data(6)
    _agrees(model, support, query, adapt="body")
    text = fastmeta.explain(model, support, query, adapt="body", inner_steps=2, executor="generic")
    assert "at every pass: no parameter is read in front of those that adapt" in text
