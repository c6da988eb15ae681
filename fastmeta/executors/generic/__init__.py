"""The general executor: any module and any loss, by one of three forms.

`vmap` maps `grad(grad)` over chunks of tasks; `loop` runs autograd's double backward task by task;
`sweep` goes backward through the inner loop with Hessian-vector products, at memory flat in K.
"""

from contextlib import ExitStack

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.executors.generic import loop, sweep, vmap
from fastmeta.executors.problem import Outcome, Problem

FORMS = ("vmap", "loop", "sweep")


def run(problem: Problem, form: str, chunk: int) -> Outcome:
    """Computes the step by the form named; `chunk` is the number of tasks that `vmap` maps over.

    **Raises** `FormUnavailable` where that form can't serve the problem.
    """
    with ExitStack() as context:
        if problem.has_attention:
            # The fused attentions have no second derivative.
            context.enter_context(sdpa_kernel(SDPBackend.MATH))
        device = problem.task_weights.device.type
        if torch.is_autocast_enabled(device):
            # Autocast's cache of cast weights would tie one inner step's graph to the next.
            context.enter_context(
                torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
            )
        if form == "vmap":
            return vmap.run(problem, chunk)
        if form == "loop":
            return loop.run(problem)
        return sweep.run(problem)


__all__ = ["FORMS", "run"]
