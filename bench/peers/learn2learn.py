"""learn2learn 0.2.0: `MAML(model).clone()` and `adapt(loss)`, one task at a time.

Its published C sources don't compile on Python 3.11 or newer, so they are generated anew from the
Cython sources beside them:

    pip install "cython==3.0.12" "setuptools"
    pip download --no-deps --no-build-isolation --no-binary :all: learn2learn==0.2.0
    tar xzf learn2learn-0.2.0.tar.gz && cd learn2learn-0.2.0
    cython -3 learn2learn/data/*.pyx
    pip install --no-deps --no-build-isolation .

`make peers` does this. Only submodules are imported: the package itself asks for gym.
"""

from __future__ import annotations

from torch import Tensor, nn

from bench.peers.peer import Peer, TaskLoss, descent_only, loop_forms, without_its_init
from bench.workloads import Workload


def _task_loss(workload: Workload, model: nn.Module) -> tuple[nn.Module, TaskLoss]:
    descent_only(workload, "its MAML")
    without_its_init("learn2learn")
    without_its_init("learn2learn.algorithms")
    from learn2learn.algorithms.maml import MAML

    maml = MAML(model, lr=workload.inner_lr)

    def loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        learner = maml.clone()
        for _ in range(workload.steps):
            learner.adapt(workload.loss_fn(learner(sx), sy))
        return workload.loss_fn(learner(qx), qy)

    return model, loss


PEER = Peer(
    "learn2learn",
    loop_forms(_task_loss),
    module="learn2learn",
    install="make peers (its sources must be generated anew: see bench/peers/learn2learn.py)",
)
