"""`DistributedDataParallel(fastmeta.MAML(...))`: each process takes its share of the tasks."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmeta

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)

WORLD, TASKS = 2, 4
# Each element is a mean over tasks, summed in another order.
ROUNDING = TASKS * 2**3 * torch.finfo(torch.float64).eps


def _maml() -> fastmeta.MAML:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return fastmeta.MAML(model, inner_lr=0.1, inner_steps=2, learn_inner_lr="layer-step")


def _tasks(first: int, last: int) -> tuple[tuple[Tensor, Tensor], ...]:
    random = torch.Generator().manual_seed(1)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, count, 3, dtype=torch.float64, generator=random)
        return x[first:last], torch.randint(2, (TASKS, count), generator=random)[first:last]

    return examples(4), examples(5)


def _train(maml: nn.Module, first: int, last: int) -> list[Tensor]:
    """The parameters after two SGD steps, and the gradient of the second."""
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        maml(*_tasks(first, last)).loss.backward()
        optimizer.step()
    return [t.detach().clone() for p in maml.parameters() for t in (p, p.grad)]


def _process(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    try:
        maml = DistributedDataParallel(_maml())
        share = TASKS // WORLD
        torch.save(_train(maml, rank * share, (rank + 1) * share), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    expected = _train(_maml(), 0, TASKS)
    mp.spawn(_process, (str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        got = torch.load(tmp_path / f"{rank}.pt")
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=ROUNDING)


@pytest.fixture
def alone(tmp_path: Path):
    """A process group of one."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("call", ["maml_step", "MAML", "adapt", "explain"])
def test_a_model_already_inside_ddp_is_refused_with_advice(call: str, alone) -> None:
    model = DistributedDataParallel(_maml().model)
    support, query = _tasks(0, TASKS)
    arguments = {"MAML": (model,), "adapt": (model, support)}.get(call, (model, support, query))
    with pytest.raises(TypeError, match=r"DistributedDataParallel\(fastmeta\.MAML\(model\)\)"):
        getattr(fastmeta, call)(*arguments)
