"""What computes but was hardly meant: regression by the default loss, tasks left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmeta

CALLS = pytest.mark.parametrize(
    "call",
    [
        fastmeta.maml_step,
        fastmeta.explain,
        lambda model, support, query: fastmeta.adapt(model, support),
        lambda model, support, query: fastmeta.MAML(model)(support, query),
        lambda model, support, query: fastmeta.maml_step(
            model, *([tuple(part[0] for part in pair)] for pair in (support, query))
        ),
        lambda model, support, query: fastmeta.maml_step(
            model, *(({"input": x}, y) for x, y in (support, query))
        ),
    ],
    ids=["maml_step", "explain", "adapt", "MAML", "ragged", "tree"],
)


def _sets(y: Callable[[], Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, 4, 5), y()) for _ in "sq"]


@CALLS
@pytest.mark.parametrize(
    "shape", [(3, 4, 1), (3, 4), (3, 4, 2)], ids=["column", "row", "two-columns"]
)
def test_regression_by_the_default_loss(call: Any, shape: tuple[int, ...]) -> None:
    model = nn.Linear(5, shape[-1] if len(shape) > 2 else 1)
    with pytest.raises(ValueError, match=r"support.*_y: float32 .* no class probabilities") as seen:
        call(model, *_sets(lambda: torch.randn(shape)))
    assert "loss_fn=torch.nn.functional.mse_loss" in str(seen.value)


@CALLS
def test_one_output_has_no_cross_entropy(call: Any) -> None:
    with pytest.raises(ValueError, match=r"model: gives \[4, 1\], one output") as seen:
        call(nn.Linear(5, 1), *_sets(lambda: torch.zeros(3, 4, dtype=torch.int64)))
    assert "loss_fn=torch.nn.functional.mse_loss" in str(seen.value)


def test_queries_are_looked_at_too() -> None:
    support, query = _sets(lambda: torch.full((3, 4, 2), 0.5))
    with pytest.raises(ValueError, match="query_y: "):
        fastmeta.maml_step(nn.Linear(5, 2), support, (query[0], 2 * query[1]))


@CALLS
@pytest.mark.parametrize(
    "probabilities",
    [
        lambda: torch.randn(3, 4, 7).softmax(-1),
        lambda: F.one_hot(torch.randint(7, (3, 4)), 7).float(),
        lambda: torch.full((3, 4, 7), 1 / 7).bfloat16().float(),
        lambda: torch.full((3, 4, 7), 0.14),
    ],
    ids=["soft", "hard", "bfloat16", "two-digits"],
)
def test_class_probabilities_pass(call: Any, probabilities: Callable[[], Tensor]) -> None:
    call(nn.Linear(5, 7), *_sets(probabilities))


def test_probabilities_of_every_pixel_pass() -> None:
    sets = [(torch.randn(3, 4, 1, 2, 2), torch.randn(3, 4, 5, 2, 2).softmax(2)) for _ in "sq"]
    fastmeta.maml_step(nn.Conv2d(1, 5, 1), *sets)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_fn": nn.CrossEntropyLoss()},
        {"loss_fn": lambda p, y: F.cross_entropy(p, y)},
        {"loss_fn": F.mse_loss},
    ],
    ids=["module", "lambda", "regression"],
)
def test_a_loss_that_was_named_takes_what_torch_takes(options: dict[str, Any]) -> None:
    fastmeta.maml_step(nn.Linear(5, 2), *_sets(lambda: torch.randn(3, 4, 2)), **options)


def test_targets_that_learn_may_leave_the_probabilities() -> None:
    support, query = _sets(lambda: torch.full((3, 4, 2), 0.7, requires_grad=True))
    fastmeta.maml_step(nn.Linear(5, 2), support, query).loss.backward()
    assert support[1].grad is not None


def test_nan_among_probabilities_is_nan_in_the_loss() -> None:
    support, query = _sets(lambda: torch.full((3, 4, 2), 0.5))
    support[1][1, 2] = torch.nan
    losses = fastmeta.maml_step(nn.Linear(5, 2), support, query).task_losses
    assert losses.isnan().tolist() == [False, True, False]


def test_values_are_looked_at_once() -> None:
    model, sets = nn.Linear(5, 2), _sets(lambda: torch.full((3, 4, 2), 0.5))
    fastmeta.maml_step(model, *sets)
    with _Reads() as reads:
        fastmeta.maml_step(model, *sets)
    assert not reads.found


class _Reads(TorchDispatchMode):
    """Comparisons, which computing a step takes none of."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.lt, torch.ops.aten.gt, torch.ops.aten.any):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Scaled(nn.Module):
    """Of examples that are numbers without features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, width))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(1, 1), (10, 1)),
        (lambda: _mlp(1), (10, 1)),
        (lambda: nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1)), (10, 1)),
        (lambda: _mlp(3), (10, 3)),
        (lambda: nn.Conv2d(1, 1, 3, padding=1), (10, 1, 5, 5)),
        (Scaled, (10, 1)),
    ],
    ids=["linear", "mlp", "dropout", "three-features", "images", "numbers"],
)
@pytest.mark.parametrize("call", ["maml_step", "explain", "adapt"])
def test_tasks_left_out(make: Callable[[], nn.Module], shape: tuple[int, ...], call: str) -> None:
    model = make()
    sets = [(torch.randn(shape), torch.randn(shape)) for _ in ("sq" if call != "adapt" else "s")]
    message = rf"support_x: .* as 10 tasks of {shape[1]} examples.*x\[None\], y\[None\]"
    random = torch.get_rng_state()
    with pytest.warns(UserWarning, match=message) as seen:
        getattr(fastmeta, call)(model, *sets, loss_fn=F.mse_loss)
    assert [warning.filename for warning in seen] == [__file__]
    assert call != "explain" or torch.equal(torch.get_rng_state(), random)
    getattr(fastmeta, call)(model, *sets, loss_fn=F.mse_loss)  # a warning would be an error
    model.eval()
    getattr(fastmeta, call)(model, *sets, loss_fn=F.mse_loss)


@pytest.mark.parametrize(
    ("make", "shape", "target"),
    [
        (lambda: nn.Linear(1, 1), (10, 1, 1), (10, 1, 1)),
        (lambda: _mlp(5), (10, 1, 5), (10, 1, 5)),
        (lambda: nn.Linear(5, 1), (10, 1, 5), (10, 1, 1)),
        (lambda: nn.LayerNorm(5), (10, 1, 5), (10, 1, 5)),
        (lambda: nn.Conv2d(1, 1, 3, padding=1), (10, 1, 1, 5, 5), (10, 1, 1, 5, 5)),
        (lambda: nn.Conv1d(2, 1, 3, padding=1), (10, 1, 2, 5), (10, 1, 1, 5)),
        (lambda: nn.Linear(1, 1), (1, 10, 1), (1, 10, 1)),
        (Scaled, (10, 3), (10, 3)),
        (lambda: nn.Sequential(nn.Unflatten(0, (-1, 1)), _mlp(1)), (10, 3), (10, 3, 1)),
    ],
    ids=["one-feature", "mlp", "one-output", "norm", "images", "series", "one-task", "numbers",
         "columns"],
)  # fmt: skip
def test_ordinary_tasks_are_no_cause_for_a_warning(
    make: Callable[[], nn.Module], shape: tuple[int, ...], target: tuple[int, ...]
) -> None:
    sets = [(torch.randn(shape), torch.randn(target)) for _ in "sq"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastmeta.maml_step(make(), *sets, loss_fn=F.mse_loss)


def test_tokens_of_one_shot_tasks() -> None:
    sets = [(torch.randint(7, (10, 1)), torch.randint(3, (10, 1))) for _ in "sq"]
    fastmeta.maml_step(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), *sets)


def test_a_loss_that_broadcasts_takes_nothing() -> None:
    sets = [(torch.randint(7, (10, 1)), torch.randn(10, 1)) for _ in "sq"]
    model = nn.Sequential(nn.Embedding(7, 1), nn.Flatten(0))
    fastmeta.maml_step(model, *sets, loss_fn=F.mse_loss)


def test_ragged_targets_of_another_kind_are_looked_at_too() -> None:
    model = nn.Linear(3, 4)
    labels = [(torch.randn(n, 3), torch.randint(4, (n,))) for n in (4, 5)]
    fastmeta.maml_step(model, labels, labels)
    numbers = [(x, torch.randn(len(x), 4)) for x, _ in labels]
    with pytest.raises(ValueError, match="no class probabilities"):
        fastmeta.maml_step(model, numbers, numbers)
