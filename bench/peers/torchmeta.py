"""torchmeta 1.8.0: its own modules, and `gradient_update_parameters`, one task at a time.

It asks for a torch below 1.10, and works with today's:

    pip install --no-deps torchmeta==1.8.0

Only submodules are imported: the package itself asks for torchvision.
"""

from __future__ import annotations

from torch import Tensor, nn

from bench.peers.peer import NotServed, Peer, TaskLoss, descent_only, loop_forms, without_its_init
from bench.workloads import Workload


def _task_loss(workload: Workload, model: nn.Module) -> tuple[nn.Module, TaskLoss]:
    descent_only(workload, "`gradient_update_parameters`")
    without_its_init("torchmeta")
    without_its_init("torchmeta.utils")
    from torchmeta.utils.gradient_based import gradient_update_parameters

    meta = _with_its_modules(model)

    def loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        phi = None
        for _ in range(workload.steps):
            value = workload.loss_fn(meta(sx, params=phi), sy)
            phi = gradient_update_parameters(meta, value, phi, step_size=workload.inner_lr)
        return workload.loss_fn(meta(qx, params=phi), qy)

    return meta, loss


def _with_its_modules(model: nn.Module) -> nn.Module:
    """The same network, each layer that holds parameters as torchmeta's subclass of it."""
    from torchmeta import modules

    if type(model) is not nn.Sequential:
        raise NotServed("torchmeta needs the network written anew in its own modules")
    known = {
        nn.Linear: modules.MetaLinear,
        nn.Conv2d: modules.MetaConv2d,
        nn.BatchNorm2d: modules.MetaBatchNorm2d,
    }
    for layer in model:
        if type(layer) in known:
            # Its classes add a `forward` and one attribute to torch's own: nothing to rebuild.
            layer.__class__ = known[type(layer)]
            layer._children_modules_parameters_cache = {}
        elif list(layer.parameters()):
            raise NotServed(f"torchmeta has no {type(layer).__name__}")
    return modules.MetaSequential(*model)


PEER = Peer(
    "torchmeta",
    loop_forms(_task_loss),
    module="torchmeta",
    install="pip install --no-deps torchmeta==1.8.0",
)
