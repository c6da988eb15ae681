"""`evaluate`: the metric of every task, its mean and interval, over all learners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

TASKS = 4


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batches(count: int = 3) -> list[tuple[Any, Any]]:
    torch.manual_seed(2)
    labels = torch.tensor([0, 1, 0, 1]).expand(TASKS, 4)

    def drawn() -> tuple[Tensor, Tensor]:
        return torch.randn(TASKS, 4, 3).double() + labels[..., None], labels

    return [(drawn(), drawn()) for _ in range(count)]


LEARNERS = {
    "maml": lambda m: fastmeta.MAML(m, inner_steps=2, inner_lr=0.3),
    "reptile": lambda m: fastmeta.Reptile(m, inner_steps=2, inner_lr=0.3),
    "imaml": lambda m: fastmeta.IMAML(m, prox=0.0001, inner_steps=2, inner_lr=0.3),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_is_its_model_adapted(name: str) -> None:
    network, given = model(), batches()
    found = fastmeta.evaluate(LEARNERS[name](network), given)
    expected: list[Tensor] = []
    for support, (x, y) in given:
        prox = 0.0001 if name == "imaml" else 0.0
        adapted = fastmeta.adapt(network, support, inner_steps=2, inner_lr=0.3, prox=prox)
        expected.append((adapted(x).argmax(-1) == y).double().mean(1))
    assert torch.equal(found.values, torch.cat(expected))
    assert found.mean == pytest.approx(float(torch.cat(expected).mean()))
    error = float(torch.cat(expected).std()) / len(found.values) ** 0.5
    assert found.half_width == pytest.approx(1.96 * error)
    assert f"{100 * found.mean:.2f} ± " in str(found)
    assert "over 12 tasks" in str(found)


def test_a_model_with_options_and_more_steps() -> None:
    network, given = model(), batches()
    options: dict[str, Any] = {"inner_lr": 0.3, "loss_fn": F.cross_entropy}
    of_model = fastmeta.evaluate(network, given, inner_steps=5, **options)
    learner = fastmeta.MAML(network, inner_steps=1, **options)
    assert torch.equal(fastmeta.evaluate(learner, given, inner_steps=5).values, of_model.values)
    assert not torch.equal(fastmeta.evaluate(learner, given).values, of_model.values)


def test_prototypes() -> None:
    given = batches()
    found = fastmeta.evaluate(fastmeta.Prototypical(model()), given)
    outs = [fastmeta.prototypical_step(model(), *each) for each in given]
    pairs = zip(outs, given, strict=True)
    each = [
        (out.query_outputs.argmax(-1) == query[1]).double().mean(1) for out, (_, query) in pairs
    ]
    assert torch.equal(found.values, torch.cat(each))


def test_a_metric_of_ones_own_is_called_task_by_task() -> None:
    network = nn.Linear(3, 1).double()
    given = [tuple((x, x.sum(-1, keepdim=True)) for x, _ in pair) for pair in batches()]
    found = fastmeta.evaluate(
        network, given, metric=lambda z, y: float((z - y).abs().max()), loss_fn=F.mse_loss
    )
    each = [
        fastmeta.maml_step(network, *pair, loss_fn=F.mse_loss).query_outputs - pair[1][1]
        for pair in given
    ]
    expected = torch.cat(each).abs().flatten(1).amax(1)
    torch.testing.assert_close(found.values, expected)
    assert "%" not in str(found)


def test_ragged_tasks() -> None:
    (x, y), (query_x, query_y) = batches(1)[0]
    support = [(x[i], y[i]) for i in range(TASKS)]
    query = [(query_x[i, : 2 + i % 2], query_y[i, : 2 + i % 2]) for i in range(TASKS)]
    network = model()
    found = fastmeta.evaluate(network, [(support, query)], inner_lr=0.3)
    for i in range(TASKS):
        one = [((x[i : i + 1], y[i : i + 1]), tuple(t[None] for t in query[i]))]
        assert fastmeta.evaluate(network, one, inner_lr=0.3).values[0] == found.values[i]


def test_nothing_is_changed_or_differentiated() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fastmeta.evaluate(network, batches())
    assert all(torch.equal(tensor, before[n]) for n, tensor in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="batches: there is none"):
        fastmeta.evaluate(model(), [])
    with pytest.raises(TypeError, match="inner_lr: the MAML has its own"):
        fastmeta.evaluate(fastmeta.MAML(model()), batches(), inner_lr=0.1)
    with pytest.raises(TypeError, match="inner_steps: prototypical"):
        fastmeta.evaluate(fastmeta.Prototypical(model()), batches(), inner_steps=1)
    given = [tuple((x, x[..., :2]) for x, _ in pair) for pair in batches()]
    with pytest.raises(TypeError, match="metric: None is the accuracy"):
        fastmeta.evaluate(model(), given, loss_fn=F.mse_loss)
