"""`DistributedDataParallel(fastmeta.MAML(...))`: each process takes its share of the tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from two_processes import TASKS, WORLD, maml, process, tasks, train

import fastmeta

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)

# Each element is a mean over tasks, summed in another order.
ROUNDING = TASKS * 2**3 * torch.finfo(torch.float64).eps


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    expected = train(maml(), 0, TASKS)
    mp.spawn(process, (str(tmp_path),), nprocs=WORLD)
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
    model = DistributedDataParallel(maml().model)
    support, query = tasks(0, TASKS)
    arguments = {"MAML": (model,), "adapt": (model, support)}.get(call, (model, support, query))
    with pytest.raises(TypeError, match=r"DistributedDataParallel\(fastmeta\.MAML\(model\)\)"):
        getattr(fastmeta, call)(*arguments)
