"""Layer norms, residual sums and dropout in the fused step, beside a plain loop of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta
from fastmeta.executors.fused.lowering import NONE, dense_layers
from fastmeta.inner import SGD, Adam
from fastmeta.network import reader

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import cpu_only

pytestmark = cpu_only


class Block(nn.Module):
    """`x + f(norm(x))`, as in a transformer, or `norm(x + f(x))`, as in its first form."""

    def __init__(self, width: int, first: bool, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(width), first
        self.f = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(p), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x)) if self.first else self.norm(self.f(x) + x)


class Reused(nn.Module):
    """A value that four read, sums without a product, and one of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        g = F.silu(h + self.second(h)) + h
        return self.last(self.norm(g + x) + torch.tanh(h) + h)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(torch.tanh(self.first(x)), (8,))
        return self.last(F.rms_norm(F.dropout(h, 0.25, self.training), (8,), eps=0.1))


class Columns(nn.Module):
    """A number a column, multiplied, added, both, before and behind layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
        self.before = nn.Parameter(torch.randn(6))
        self.gain, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.other, self.end = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.gain * self.first(x * self.before) + self.shift)
        h = torch.mul(h, self.other)
        return self.last(h) + self.end


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "pre-norm": lambda: nn.Sequential(
        nn.Linear(6, 8), Block(8, True), Block(8, True), nn.Linear(8, 3)
    ),
    "post-norm": lambda: nn.Sequential(nn.Linear(6, 8), Block(8, False), nn.Linear(8, 3)),
    "norm of inputs": lambda: nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 8), nn.RMSNorm(8), nn.Tanh(), nn.Linear(8, 3)
    ),
    "norm last": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.LayerNorm(3)
    ),
    "reused": Reused,
    "dropout": lambda: nn.Sequential(
        nn.Dropout(0.2), nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), Block(8, True, 0.3),
        nn.Linear(8, 3),
    ),
    "functional": Functional,
    "columns": Columns,
}  # fmt: skip


def data(tasks: int = 3) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def drawn(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(tasks, count, 6).double(), torch.randint(3, (tasks, count))

    return drawn(5), drawn(4)


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]().double()


def plain_loop(
    model: nn.Module, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor],
    *, steps: int = 3, rate: float = 0.1, weights: list[float] | None = None, head: str = "",
) -> Tensor:  # fmt: skip
    """MAML as people write it; with `weights` the query set is evaluated before every step too."""
    total = torch.zeros((), dtype=torch.float64)
    weights = weights or [0.0] * steps + [1.0]
    for sx, sy, qx, qy in zip(*support, *query, strict=True):
        theta = dict(model.named_parameters())
        for step in range(steps + 1):
            if weights[step]:
                output = functional_call(model, theta, (qx,))
                total = total + weights[step] * F.cross_entropy(output, qy) / len(support[0])
            if step == steps:
                break
            loss = F.cross_entropy(functional_call(model, theta, (sx,)), sy)
            moving = {n: p for n, p in theta.items() if n.startswith(head)}
            found = torch.autograd.grad(loss, [*moving.values()], create_graph=True)
            moved = zip(moving.items(), found, strict=True)
            theta.update({n: p - rate * g for (n, p), g in moved})
    return total


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    pairs = zip(found, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@pytest.mark.parametrize("engine", ["tasks", "features"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_gives_the_numbers_of_a_plain_loop(name: str, engine: str, monkeypatch) -> None:
    """With dropout also the masks: the generator is where the loop leaves it."""
    monkeypatch.setenv("FASTMETA_ENGINE", engine)
    model = made(name)
    support, query = data()
    torch.manual_seed(7)
    expected = plain_loop(model, support, query)
    after = torch.rand(())
    torch.manual_seed(7)
    out = fastmeta.maml_step(model, support, query, inner_steps=3, inner_lr=0.1)
    assert out.executor == "fused-cpu"
    assert torch.equal(torch.rand(()), after)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    ours, theirs = gradient(model, out.loss), gradient(model, expected)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-13


@pytest.mark.parametrize("name", ["columns", "pre-norm", "reused"])
def test_the_layers_rules_give_the_same(name: str) -> None:
    model = made(name)
    support, query = data()
    found: list[Tensor] = []
    for executor in ("layered", "fused"):
        out = fastmeta.maml_step(
            model, support, query, inner_steps=2, inner_lr=0.1, executor=executor
        )
        found.append(gradient(model, out.loss))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-13


def test_masks_of_query_losses_after_every_step() -> None:
    model = made("dropout")
    support, query = data()
    weights = [0.5, 0.0, 0.3, 1.0]
    torch.manual_seed(7)
    expected = plain_loop(model, support, query, weights=weights)
    torch.manual_seed(7)
    out = fastmeta.maml_step(
        model, support, query, inner_steps=3, inner_lr=0.1, step_weights=weights
    )
    assert out.executor == "fused-cpu"
    ours, theirs = gradient(model, out.loss), gradient(model, expected)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-13


@pytest.mark.parametrize("name", ["pre-norm", "dropout"])
def test_a_head_that_adapts_alone(name: str) -> None:
    """Layers in front are run once, unless they draw."""
    model = made(name)
    head = "3" if name == "pre-norm" else "5"
    support, query = data()
    torch.manual_seed(7)
    expected = plain_loop(model, support, query, head=head)
    torch.manual_seed(7)
    out = fastmeta.maml_step(
        model, support, query, inner_steps=3, inner_lr=0.1, adapt=lambda n, _: n.startswith(head)
    )
    assert out.executor == "fused-cpu"
    ours, theirs = gradient(model, out.loss), gradient(model, expected)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-13


@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam(eps=0.1)], ids=["momentum", "adam"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("name", ["post-norm", "reused"])
def test_update_rules(name: str, per_step: bool, rule: SGD, monkeypatch) -> None:
    model = made(name)
    (x, y), query = data()
    support = (torch.stack([x, x + 1], 1), torch.stack([y, y], 1)) if per_step else (x, y)
    found: dict[str, Tensor] = {}
    for executor in ("fused", "generic"):
        out = fastmeta.maml_step(
            model, support, query, inner_steps=2, inner_lr=0.1, inner_optimizer=rule, prox=0.2,
            per_step_support=per_step, executor=executor,
        )  # fmt: skip
        found[executor] = gradient(model, out.loss)
    apart = (found["fused"] - found["generic"]).norm() / found["generic"].norm()
    assert float(apart) < 1e-12


@pytest.mark.parametrize("name", ["pre-norm", "reused"])
def test_open_passes(name: str) -> None:
    """A loss that torch computes: it sorts."""
    model = made(name)
    support, query = data()

    def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(prediction, target, reduction="none")
        return losses.sort().values[1:].mean()

    found: list[Tensor] = []
    for executor in ("fused", "generic"):
        out = fastmeta.maml_step(
            model, support, query, inner_steps=2, inner_lr=0.1, loss_fn=loss_fn, executor=executor
        )
        found.append(gradient(model, out.loss))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-12


def test_a_body_behind_which_layers_reach_back() -> None:
    """What adapts reads two layers that do not: all of them run at every step."""

    class Reaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = torch.tanh(self.a(x))
            b = torch.tanh(self.b(a))
            return self.head(torch.tanh(b) + a)

    torch.manual_seed(0)
    model = Reaching().double()
    support, query = data()
    expected = plain_loop(model, support, query, head="head")
    out = fastmeta.maml_step(
        model, support, query, inner_steps=3, inner_lr=0.1, adapt=lambda n, _: n.startswith("head")
    )
    assert out.executor == "fused-cpu"
    ours, theirs = gradient(model, out.loss), gradient(model, expected)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-13


def test_what_alone_reads_a_layer_becomes_a_part_of_it() -> None:
    model = made("pre-norm")
    network = reader.read(model, torch.randn(5, 6).double())
    layers = dense_layers(network.nodes, network.output)
    # Of a block: norm, product with GELU, product with sum.
    assert len(layers) == 1 + 2 * 3 + 1
    assert [layer.plus for layer in layers] == [NONE, NONE, NONE, 0, NONE, NONE, 3, NONE]
    assert layers[2].activation is not None


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p: float) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 3)).double()
    support, query = data()
    expected = plain_loop(model, support, query)
    out = fastmeta.maml_step(model, support, query, inner_steps=3, inner_lr=0.1)
    assert (out.executor == "fused-cpu") == (p == 0)
    torch.testing.assert_close(gradient(model, out.loss), gradient(model, expected))


def test_a_mask_that_nothing_reads_is_drawn_all_the_same() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            self.dropout(h)
            return self.last(self.dropout(h))

    model = Unread().double()
    support, query = data()
    torch.manual_seed(7)
    expected = plain_loop(model, support, query)
    torch.manual_seed(7)
    out = fastmeta.maml_step(model, support, query, inner_steps=3, inner_lr=0.1, executor="generic")
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="can't serve"):
        fastmeta.maml_step(model, support, query, executor="fused")


def test_eval_draws_nothing() -> None:
    model = made("dropout").eval()
    support, query = data()
    state = torch.get_rng_state()
    out = fastmeta.maml_step(model, support, query, inner_steps=3, inner_lr=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    expected = plain_loop(model, support, query)
    torch.testing.assert_close(gradient(model, out.loss), gradient(model, expected))


def test_adapted_parameters_under_dropout() -> None:
    model = made("dropout")
    support, _ = data(1)
    torch.manual_seed(7)
    theta = dict(model.named_parameters())
    for _ in range(2):
        output = functional_call(model, theta, (support[0][0],))
        loss = F.cross_entropy(output, support[1][0])
        found = torch.autograd.grad(loss, [*theta.values()])
        theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), found, strict=True)}
    torch.manual_seed(7)
    adapted = fastmeta.adapt(model, support, inner_steps=2, inner_lr=0.1)
    for name, tensor in adapted.parameters.items():
        torch.testing.assert_close(tensor[0], theta[name], rtol=1e-12, atol=1e-14)


class Squeezed(nn.Module):
    """One number an example, by one of the ways in which people write that."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.layers(x))


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "squeeze(-1)": lambda y: y.squeeze(-1),
    "squeeze(1)": lambda y: y.squeeze(1),
    "torch.squeeze": lambda y: torch.squeeze(y, dim=1),
    "[:, 0]": lambda y: y[:, 0],
    "[..., 0]": lambda y: y[..., 0],
    "view": lambda y: y.view(-1),
    "flatten": lambda y: y.flatten(),
}


def asymmetric(prediction: Tensor, target: Tensor) -> Tensor:
    error = target - prediction
    return torch.maximum(0.9 * error, -0.1 * error).mean()


@pytest.mark.parametrize("loss_fn", [F.mse_loss, asymmetric], ids=["mse", "quantile"])
@pytest.mark.parametrize("way", WAYS)
def test_one_number_an_example(way: str, loss_fn: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Squeezed(WAYS[way]).double()
    (sx, _), (qx, _) = data()
    support, query = (sx, torch.randn(3, 5).double()), (qx, torch.randn(3, 4).double())
    found: list[Tensor] = []
    for executor in ("fused", "generic"):
        out = fastmeta.maml_step(
            model, support, query, inner_steps=2, inner_lr=0.1, loss_fn=loss_fn, executor=executor
        )
        assert out.query_outputs.shape == (3, 4)
        found += [out.query_outputs, gradient(model, out.loss)]
    torch.testing.assert_close(found[0], found[2])
    assert float((found[1] - found[3]).norm() / found[3].norm()) < 1e-12


def test_a_dimension_that_is_more_than_one_is_not_taken_away() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    class Column(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)[:, 0]

    (sx, _), (qx, _) = data()
    support, query = (sx, torch.randn(3, 5).double()), (qx, torch.randn(3, 4).double())
    out = fastmeta.maml_step(Column(), support, query, loss_fn=F.mse_loss)
    assert out.query_outputs.shape == (3, 4)
    assert "fused" not in out.executor


class Auxiliary(nn.Module):
    """A second head that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.other, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.norm(self.other(h)) + h
        return self.last(h)


def test_what_nobody_reads_has_no_gradient() -> None:
    torch.manual_seed(0)
    model = Auxiliary().double()
    support, query = data()
    expected = of_general_path(model, support, query)
    for _ in range(3):
        out = fastmeta.maml_step(model, support, query, inner_steps=2, inner_lr=0.1)
        assert out.executor == "fused-cpu"
        found = torch.autograd.grad(out.loss, [*model.parameters()], allow_unused=True)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


def of_general_path(
    model: nn.Module, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    out = fastmeta.maml_step(model, support, query, inner_steps=2, inner_lr=0.1, executor="generic")
    return [*torch.autograd.grad(out.loss, [*model.parameters()], allow_unused=True)]


def test_a_norm_over_examples_is_none_of_the_kernels() -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(F.layer_norm(h, (5, 8)))

    (sx, sy), _ = data()
    out = fastmeta.maml_step(Over().double(), (sx, sy), (sx, sy), inner_lr=0.1)
    assert "fused" not in out.executor


@pytest.mark.parametrize("shape", [(), (1,), (4,)])
def test_weights_of_one_number_an_example(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Squeezed(WAYS["squeeze(-1)"]).double()
    (sx, _), (qx, _) = data(4)
    sx, qx = sx[:, :4], qx[:, :4]
    y = torch.rand(4, 4).double()
    loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.rand(shape).double())
    found: list[Tensor] = []
    for executor in ("auto", "generic"):
        out = fastmeta.maml_step(
            model, (sx, y), (qx, y), inner_lr=0.1, loss_fn=loss_fn, executor=executor
        )
        found.append(gradient(model, out.loss))
    torch.testing.assert_close(*found)


def test_masks_of_inputs_lie_as_these_do() -> None:
    """Where inputs are no rows in memory torch fills a mask in their order: it is left to torch."""
    model = made("dropout")
    (sx, sy), (qx, qy) = data()
    fastmeta.maml_step(model, (sx, sy), (qx, qy), inner_steps=3, inner_lr=0.1)
    sx, qx = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (sx, qx))
    torch.manual_seed(7)
    expected = plain_loop(model, (sx, sy), (qx, qy))
    torch.manual_seed(7)
    out = fastmeta.maml_step(model, (sx, sy), (qx, qy), inner_steps=3, inner_lr=0.1)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)


def test_a_step_that_is_refused_draws_nothing() -> None:
    model = made("dropout")
    support, (qx, qy) = data()
    fastmeta.maml_step(model, support, (qx, qy), inner_lr=0.1)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="query_y"):
        fastmeta.maml_step(model, support, (qx, qy + 5), inner_lr=0.1)
    assert torch.equal(torch.get_rng_state(), state)
