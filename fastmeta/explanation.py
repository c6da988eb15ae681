"""`explain`: the plan of a step in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastmeta.arguments import PlannedStep, plain_module, plan_step
from fastmeta.executors.generic import cost
from fastmeta.network.reading import Reading
from fastmeta.options import Options
from fastmeta.plan import planner
from fastmeta.plan.planner import Planned
from fastmeta.wording import counted

_FAMILIES = ("fused", "layered", "generic")
"""Of executors, the fastest first where several serve."""


def explain(model: nn.Module, support: Any, query: Any, **options: Any) -> str:
    """The way in which `maml_step` with these arguments is computed, and why not faster.

    Runs one task once to see what the model does; model, gradients and generators stay as they are.

    **Arguments:** those of `maml_step`.

    **Returns:** text: the layers, the loss, the executor and its form, FLOPs and bytes.

    **Raises:** what `maml_step` raises for the same arguments.
    """
    module = plain_module(model)
    with planner.stepping(module) as seen:
        given, differentiate = Options(**options), torch.is_grad_enabled()
        step = plan_step(module, seen, support, query, given, differentiate)
    first = step.groups[0][1]
    lines = [
        *_layers(type(module).__name__, first.selected.reading),
        f"loss: {_loss(first.selected.reading)}",
        _inner(step),
        *_executors(first),
    ]
    for indices, planned in step.groups:
        lines += _group(len(indices), planned, len(step.groups) > 1)
    return "\n".join(lines)


def _loss(reading: Reading) -> str:
    """The support sets' loss in words."""
    if reading.loss is not None:
        return str(reading.loss)
    return "not a standard one; " + ("a formula" if reading.traced[0] else "taken as it is")


def _layers(name: str, reading: Reading) -> list[str]:
    if reading.network is None:
        return [f"model: {name}, not read into layers: {reading.unreadable}"]
    nodes = reading.network.nodes
    lines = [
        f"model: {name}, {counted(len(nodes), 'layer')}; FLOP and bytes of one example, forward"
    ]
    for node in nodes:
        kind = getattr(node.layer, "kind", type(node.layer).__name__)
        lines.append(
            f"  {node.name:<24} {kind:<20} -> {list(node.shape)!s:<18} {node.flops:>12,} FLOP"
            f" {node.bytes:>10,} bytes"
        )
    return lines


def _inner(step: PlannedStep) -> str:
    inner = step.inner
    order = "first order" if inner.first_order else "second order"
    steps, adapted = counted(inner.steps, "step"), counted(len(inner.adapted), "parameter")
    return f"inner loop: {steps}, {order}; adapting: {adapted}"


def _executors(planned: Planned) -> list[str]:
    """The executor, and why those are not taken that are faster where they serve."""
    selected, executor = planned.selected, planned.selected.executor
    lines = [f"executor: {executor.family} on {selected.device}"]
    if executor.replaces_module:
        # Anew: torch's switches of precision may have changed since.
        offer = executor.make_offer(selected.reading, planned.problem.without_unread)
        lines.append(f"  kernel: {offer.description}")
    for family in _FAMILIES[: _FAMILIES.index(executor.family)]:
        reason = selected.unsupported_by(family)
        lines.append(f"  not {family}: {reason or 'slower'}")
    return lines


def _group(count: int, planned: Planned, several: bool) -> list[str]:
    selected, problem = planned.selected, planned.problem
    offer, profile, tasks = selected.offer, selected.reading.profile, problem.tasks
    queries = tasks.query.count if tasks.query else 0
    where = f"{counted(count, 'task')} of {tasks.support.count} + {queries} examples"
    arithmetic = cost.meta_step_flops(profile, problem, offer.body_flops)
    generic = not selected.executor.replaces_module
    how = f", {offer.description}" if generic else ""
    lines = [
        f"form{f' for {where}' if several else ''}: {offer.form}{how} ({selected.reason})",
        *(f"  not {name}: {reason}" for name, reason in selected.unsupported_forms()),
        f"  arithmetic: {arithmetic:,} FLOP for {where}",
        f"  workspace: about {offer.workspace_bytes:,} bytes",
    ]
    if selected.features is not None:
        how = f"at every pass: {selected.features}" if selected.features else "once a task and set"
        lines.append(f"  layers in front of the parameters that adapt run {how}")
    return lines
