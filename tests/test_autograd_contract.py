"""`out.loss` is a scalar like any other of torch's: scaled, summed, hooked, clipped, stepped on."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from torch import Tensor, nn

import fastmeta

STEPS, RATE = 2, 0.1
OPTIONS = {"inner_steps": STEPS, "inner_lr": RATE}
FORMS = pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
# Three passes a step and one at the end, up to ten operators deep, 2^3 roundings to lose at each.
DEPTH = (3 * STEPS + 1) * 10 * 2**3
ROUNDING = DEPTH * torch.finfo(torch.float64).eps
# Roundings of random sign add up as the root of their count.
BFLOAT16 = ((3 * STEPS + 1) * 10) ** 0.5 * torch.finfo(torch.bfloat16).eps


class Network(nn.Module):
    """A small classifier, and a layer that its forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unread, self.head = nn.Linear(3, 4), nn.Linear(2, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _tasks(seed: int = 1, dtype: torch.dtype = torch.float64):
    random = torch.Generator().manual_seed(seed)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(3, count, 3, dtype=torch.float64, generator=random).to(dtype)
        return x, torch.randint(2, (3, count), generator=random)

    return examples(4), examples(5)


def _loss(model: nn.Module, seed: int = 1) -> Tensor:
    return fastmeta.maml_step(model, *_tasks(seed), **OPTIONS).loss


def _oracle(model: nn.Module, seed: int = 1) -> oracle.Reference:
    return oracle.maml(
        model,
        oracle.split(*_tasks(seed)),
        list(model.parameters()),
        steps=STEPS,
        rate=lambda name, step: RATE,
    )


def _grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def _gradient(model: nn.Module, seed: int = 1) -> list[Tensor]:
    """What a plain `backward()` gives, on a copy."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    _loss(twin, seed).backward()
    return _grads(twin)


def _flat(tensors) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def _error(ours, theirs) -> float:
    ours, theirs = _flat(ours), _flat(theirs)
    return float((ours - theirs).norm() / theirs.norm())


def test_backward_adds_the_gradient_of_the_oracle() -> None:
    model = _model()
    _loss(model).backward()
    assert _error(_grads(model), _oracle(model).gradients) < ROUNDING


def test_two_steps_accumulate() -> None:
    model = _model()
    _loss(model, seed=1).backward()
    _loss(model, seed=2).backward()
    both = zip(_gradient(model, 1), _gradient(model, 2), strict=True)
    for got, (first, second) in zip(_grads(model), both, strict=True):
        assert torch.equal(got, first + second)


def test_zero_grad_forgets_the_last_step() -> None:
    model = _model()
    _loss(model, seed=2).backward()
    model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())
    _loss(model).backward()
    assert all(map(torch.equal, _grads(model), _gradient(model)))


def test_a_grad_scaler_scales_exactly_and_steps() -> None:
    model, unscaled = _model(), _model()
    unscaled.load_state_dict(model.state_dict())
    expected = _gradient(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two: no rounding
    scaler.scale(_loss(model)).backward()
    assert all(torch.equal(got, 1024 * g) for got, g in zip(_grads(model), expected, strict=True))
    scaler.unscale_(optimizer)
    assert all(map(torch.equal, _grads(model), expected))
    scaler.step(optimizer)
    scaler.update()
    for p, before, g in zip(model.parameters(), unscaled.parameters(), expected, strict=True):
        assert torch.equal(p, before.detach().add(g, alpha=-0.5))


def test_a_grad_scaler_skips_a_step_that_overflowed() -> None:
    model = _model()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(_loss(model) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_clipping() -> None:
    model = _model()
    _loss(model).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected = _flat(_oracle(model).gradients)
    assert abs(float(norm - expected.norm())) < ROUNDING * float(norm)
    # torch divides by the norm plus 1e-6.
    clipped = expected * 1e-3 / (expected.norm() + 1e-6)
    assert _error(_grads(model), [clipped]) < ROUNDING


def test_tensor_hooks_fire_once_and_may_change_the_gradient() -> None:
    model = _model()
    expected, fired = _gradient(model), []

    def double(name: str):
        def hook(gradient: Tensor) -> Tensor:
            fired.append(name)
            return 2 * gradient

        return hook

    for name, p in model.named_parameters():
        p.register_hook(double(name))
    _loss(model).backward()
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())
    assert all(torch.equal(got, 2 * g) for got, g in zip(_grads(model), expected, strict=True))


def test_post_accumulate_hooks_fire_once_with_grad_in_place() -> None:
    model = _model()
    seen: dict[int, list[Tensor]] = {}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: seen.setdefault(id(p), []).append(p.grad.clone())
        )
    _loss(model).backward()
    for p in model.parameters():
        (at_hook,) = seen[id(p)]
        assert torch.equal(at_hook, p.grad)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), id="sgd-momentum"),
        pytest.param(lambda ps: torch.optim.Adam(ps, lr=0.01), id="adam"),
    ],
)
def test_optimizers_step_as_with_the_gradient_of_the_oracle(make) -> None:
    ours, theirs = _model(), _model()
    theirs.load_state_dict(ours.state_dict())
    optimizers = make(ours.parameters()), make(theirs.parameters())
    smallest = 1.0
    for seed in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss(ours, seed).backward()
        for p, g in zip(theirs.parameters(), _oracle(theirs, seed).gradients, strict=True):
            p.grad = g
            smallest = min(smallest, float(g.abs().min() / g.norm()))
        for optimizer in optimizers:
            optimizer.step()
    # Adam divides each element by its own size: small ones lose as many digits as they are small.
    assert _error(ours.parameters(), theirs.parameters()) < 3 * ROUNDING / smallest


def test_a_multiple_of_the_loss() -> None:
    model = _model()
    (_loss(model) * 3).backward()
    for got, g in zip(_grads(model), _gradient(model), strict=True):
        assert torch.equal(got, 3 * g)


def test_added_to_another_loss_on_the_same_parameters() -> None:
    model = _model()
    decay = sum(p.square().sum() for p in model.parameters())
    (_loss(model) + decay / 2).backward()
    expected = [g + p for g, p in zip(_gradient(model), model.parameters(), strict=True)]
    # One sum, in one order or the other.
    assert _error(_grads(model), expected) <= 2 * torch.finfo(torch.float64).eps


def test_a_retained_graph_gives_the_same_again_and_a_freed_one_torchs_error() -> None:
    model = _model()
    expected, loss = _gradient(model), _loss(model)
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(got, 2 * g) for got, g in zip(_grads(model), expected, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_what_was_computed_survives_an_optimizer_step_before_backward() -> None:
    model = _model()
    expected, loss = _gradient(model), _loss(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    loss.backward()
    assert all(map(torch.equal, _grads(model), expected))


def _penalty(loss: Tensor, model: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return sum(g.square().sum() for g in gradients)


def test_double_backward_is_refused() -> None:
    model = _model()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        _penalty(_loss(model) * scale, model).backward()


def test_a_gradient_penalty_is_refused_not_dropped() -> None:
    model = _model()
    loss = _loss(model)
    with pytest.raises(RuntimeError):
        (loss + _penalty(loss, model)).backward()


def test_autograd_grad_returns_the_gradient_and_leaves_grad_alone() -> None:
    model = _model()
    got = torch.autograd.grad(_loss(model), list(model.parameters()))
    assert all(map(torch.equal, got, _gradient(model)))
    assert all(p.grad is None for p in model.parameters())


def test_autograd_grad_of_some_of_the_parameters() -> None:
    model = _model()
    (got,) = torch.autograd.grad(_loss(model), [model[2].weight])
    assert torch.equal(got, _gradient(model)[2])


def test_only_the_loss_is_differentiable() -> None:
    out = fastmeta.maml_step(_model(), *_tasks(), **OPTIONS)
    assert out.loss.requires_grad
    for tensor in (out.task_losses, out.query_outputs, out.support_losses):
        assert not tensor.requires_grad


@FORMS
def test_without_grad_only_the_loss(form: str, force_form) -> None:
    force_form(form)
    model = _model()
    expected = float(_loss(model).detach())
    with torch.no_grad():
        loss = _loss(model)
    assert not loss.requires_grad
    assert abs(float(loss) - expected) < ROUNDING


def test_without_grad_no_gradient_is_computed(monkeypatch) -> None:
    computed = []
    maml, data = fastmeta.MAML(_model()), _tasks()
    compute = maml._compute
    monkeypatch.setattr(maml, "_compute", lambda p: computed.append(compute(p)) or computed[-1])
    maml(*data)
    with torch.no_grad():
        maml(*data)
    with torch.inference_mode():
        maml(*data)
    known = [any(g is not None for _, g in outcome.gradients) for outcome in computed]
    assert known == [True, False, False]


@FORMS
def test_in_inference_mode_with_data_of_its_own_only_the_loss(form: str, force_form) -> None:
    force_form(form)
    model = _model()
    expected = float(_loss(model).detach())
    with torch.inference_mode():
        support, query = _tasks()
        assert support[0].is_inference()
        loss = fastmeta.maml_step(model, support, query, **OPTIONS).loss
    assert not loss.requires_grad
    assert abs(float(loss) - expected) < ROUNDING


@FORMS
def test_a_parameter_that_the_loss_does_not_reach_keeps_no_grad(form: str, force_form) -> None:
    force_form(form)
    model = Network().double()
    fastmeta.maml_step(model, *_tasks(), **OPTIONS).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"unread.weight", "unread.bias"}


@FORMS
def test_first_call_with_a_bfloat16_model(form: str, force_form) -> None:
    force_form(form)
    model = _model().bfloat16()
    fastmeta.maml_step(model, *_tasks(dtype=torch.bfloat16), **OPTIONS).loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    exact = copy.deepcopy(model).double()
    tasks = tuple((x.bfloat16().double(), y) for x, y in _tasks())
    reference = oracle.maml(
        exact,
        oracle.split(*tasks),
        list(exact.parameters()),
        steps=STEPS,
        rate=lambda name, step: RATE,
    )
    assert _error(_grads(model), reference.gradients) < BFLOAT16


@FORMS
def test_autocast_is_close_to_float32_and_equal_to_a_loop_by_hand(form: str, force_form) -> None:
    force_form(form)
    model, tasks = _model().float(), _tasks(dtype=torch.float32)
    full = copy.deepcopy(model)
    fastmeta.maml_step(full, *tasks, **OPTIONS).loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fastmeta.maml_step(model, *tasks, **OPTIONS).loss.backward()
        by_hand = oracle.maml(
            model,
            oracle.split(*tasks),
            list(model.parameters()),
            steps=STEPS,
            rate=lambda name, step: RATE,
        )
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0 < _error(_grads(model), _grads(full)) < BFLOAT16
    # bfloat16 rounds the same numbers in both, unless a sum in another order falls the other way.
    tolerance = DEPTH * torch.finfo(torch.float32).eps if form == "loop" else BFLOAT16
    assert _error(_grads(model), by_hand.gradients) < tolerance
