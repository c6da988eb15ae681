"""Models that do odd things: written buffers, late ones, outputs of one's own, caches by size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta


def data(tasks: int = 3) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def pair(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(tasks, count, 3), torch.randint(2, (tasks, count))

    return pair(5), pair(6)


class WritesOnQuery(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 5:
            self.seen.copy_(torch.ones(()))
        return self.layer(x)


class LateBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = torch.ones(3)
        return self.layer(x * self.late)


class CachesBySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.table: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.table:
            self.table[len(x)] = torch.linspace(0, 1, len(x))[:, None]
        return self.layer(x * self.table[len(x)])


@pytest.mark.parametrize("tasks", [1, 3, 40])
def test_a_buffer_written_on_the_query_set_alone_stays(tasks: int) -> None:
    model = WritesOnQuery()
    fastmeta.maml_step(model, *data(tasks)).loss.backward()
    assert model.seen == 0


def test_a_buffer_made_late_is_not_left_behind() -> None:
    model = LateBuffer()
    fastmeta.maml_step(model, *data()).loss.backward()
    assert model.late is None


def test_what_a_forward_caches_can_be_copied_afterwards() -> None:
    model = CachesBySize()
    fastmeta.maml_step(model, *data(40))
    copy.deepcopy(model)


@dataclass
class Output:
    logits: Tensor


class GivesAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Output:
        return Output(self.layer(x))


def test_an_output_that_is_an_object_of_ones_own() -> None:
    model, tasks = GivesAnObject(), data()
    out = fastmeta.maml_step(model, *tasks, loss_fn=lambda o, y: F.cross_entropy(o.logits, y))
    assert out.query_outputs is None
    torch.testing.assert_close(out.loss, fastmeta.maml_step(model.layer, *tasks).loss)


class Gram(nn.Module):
    """Its prediction has a column for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h @ h.T


def test_a_prediction_whose_shape_depends_on_the_number_of_examples() -> None:
    support, query = (
        (torch.randn(3, 5, 3), torch.randn(3, 5, 5)),
        (
            torch.randn(3, 6, 3),
            torch.randn(3, 6, 6),
        ),
    )
    assert fastmeta.maml_step(Gram(), support, query, loss_fn=F.mse_loss).loss.isfinite()


def test_the_loss_under_autocast_is_not_rounded() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastmeta.maml_step(nn.Linear(3, 2), *data(), inner_steps=2)
    assert out.loss.dtype == torch.float32


def test_a_loss_that_depends_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="depends on no parameter"):
        fastmeta.maml_step(
            nn.Linear(3, 2), *data(), loss_fn=lambda p, y: F.cross_entropy(p, y).detach()
        )


@pytest.mark.parametrize("kind", ["scalar", "layer", "element"])
def test_learned_rates_of_parameters_with_any_name(kind: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values, self.all = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * self.values * self.all)

    maml = fastmeta.MAML(Named(), learn_inner_lr=kind)
    maml(*data()).loss.backward()
    assert all(p.grad is not None for p in maml.parameters())


def agrees(model: nn.Module, width: int, executor: str) -> None:
    """Loss and meta-gradient of two inner steps are autograd's, in float64."""
    model.double()
    sets = [(torch.randn(3, 4, width).double(), torch.randint(2, (3, 4))) for _ in "sq"]
    out = fastmeta.maml_step(model, *sets, inner_steps=2, executor=executor)
    out.loss.backward()
    leaves = list(model.parameters())
    expected = oracle.maml(model, oracle.split(*sets), leaves, steps=2)
    torch.testing.assert_close(out.loss.detach(), expected.loss)
    torch.testing.assert_close([p.grad for p in leaves], expected.gradients)


class Image(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 1, 3, 3)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 4)), 3),
        (lambda: nn.Sequential(nn.Linear(3, 0), nn.ReLU(), nn.Linear(0, 4)), 3),
        (lambda: nn.Linear(0, 4), 0),
        (lambda: nn.Sequential(nn.Linear(0, 3), nn.Tanh(), nn.Linear(3, 4)), 0),
        (
            lambda: nn.Sequential(
                Image(), nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 0),
                nn.Linear(0, 4),
            ),
            9,
        ),
    ],
    ids=["between", "activated", "input", "wide-after", "images"],
)  # fmt: skip
@pytest.mark.parametrize("executor", ["auto", "generic"])
def test_empty_layers_compute_as_torch_does(
    make: Callable[[], nn.Module], width: int, executor: str
) -> None:
    agrees(make(), width, executor)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_by_their_rules() -> None:
    model = nn.Sequential(nn.Linear(3, 0), nn.Tanh(), nn.Linear(0, 4))
    agrees(model, 3, "layered")
    with pytest.raises(ValueError, match=r"'fused' can't serve: 0 has no inputs or no outputs"):
        agrees(model, 3, "fused")
