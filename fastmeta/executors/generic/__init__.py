"""The general executor: any module and any loss, by one of three forms.

`vmap` maps `grad(grad)` over chunks of tasks; `loop` runs autograd's double backward task by task;
`sweep` goes backward through the inner loop with Hessian-vector products, at memory flat in K.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.executors.generic import loop, sweep, vmap
from fastmeta.executors.generic.calls import generators, set_generators
from fastmeta.executors.generic.features import Body, NotKept, worth_keeping
from fastmeta.executors.problem import Outcome, Problem

FORMS = ("vmap", "loop", "sweep")


def run(problem: Problem, form: str, chunk: int, keep: bool | None = None) -> Outcome:
    """Computes the step by the form named; `chunk` is the number of tasks that `vmap` maps over.

    With `keep`, the layers in front of the parameters that adapt run once a task and set; by
    default where that has been verified.

    **Raises** `FormUnavailable` where that form can't serve the problem, and `NotKept` where
    `keep` can't be.
    """
    if keep is not None:
        return _run(problem, form, chunk, Body(problem) if keep else None)
    if problem.keeps_features and worth_keeping(problem, form):
        device = problem.task_weights.device
        drawn = generators(device)
        try:
            return _run(problem, form, chunk, Body(problem))
        except (NotKept, RuntimeError):
            # On other data than it was verified on; an error of the model's own comes again.
            set_generators(drawn, device)
    return _run(problem, form, chunk, None)


def _run(problem: Problem, form: str, chunk: int, body: Body | None) -> Outcome:
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
            return vmap.run(problem, chunk, body)
        if form == "loop":
            return loop.run(problem, body)
        return sweep.run(problem, body)


__all__ = ["FORMS", "NotKept", "run", "worth_keeping"]
