"""`explain`: the plan of a step in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastmeta.arguments import PlannedStep, plain_module, plan_step
from fastmeta.executors.layers import Kernel, Program
from fastmeta.plan import cost, planner
from fastmeta.plan.chosen import Chosen
from fastmeta.wording import counted


def explain(model: nn.Module, support: Any, query: Any, **options: Any) -> str:
    """How `maml_step` with these arguments is computed, and why not by something faster.

    Runs one task once to see what the model does; model, gradients and generators stay as they are.

    **Arguments:** those of `maml_step`.

    **Returns:** text: the layers, the loss, the executor and its form, FLOPs and bytes.

    **Raises:** what `maml_step` raises for the same arguments.
    """
    options.setdefault("inner_lr", 0.01)
    options.setdefault("inner_steps", 1)
    options.setdefault("loss_fn", nn.functional.cross_entropy)
    module = plain_module(model)
    with planner.stepping(module) as seen:
        differentiate = torch.is_grad_enabled()
        step = plan_step(module, seen, support, query, differentiate=differentiate, **options)
    first = step.groups[0][1].chosen
    lines = [
        *_layers(type(module).__name__, first),
        f"loss: {first.plan.loss or 'not a standard one; taken as it is'}",
        _inner(step),
        *_executors(first, step.task_weights.device),
    ]
    for indices, planned in step.groups:
        lines += _group(len(indices), planned.chosen, len(step.groups) > 1)
    return "\n".join(lines)


def _layers(name: str, chosen: Chosen) -> list[str]:
    network = chosen.plan.network
    if network is None:
        return [f"model: {name}, not read into layers: {chosen.plan.unreadable}"]
    way = chosen.layered
    nodes, kept = network.nodes, [""] * len(network.nodes)
    if isinstance(way, Program):
        nodes, kept = way.recipe.nodes, [f" {size:>14,} kept" for size in way.workspaces]
    lines = [
        f"model: {name}, {counted(len(nodes), 'layer')}; FLOP and bytes of one example, forward"
    ]
    for node, keeps in zip(nodes, kept, strict=True):
        kind = getattr(node.layer, "kind", type(node.layer).__name__)
        lines.append(
            f"  {node.name:<24} {kind:<20} -> {list(node.shape)!s:<18} {node.flops:>12,} FLOP"
            f" {node.bytes:>10,} bytes{keeps}"
        )
    return lines


def _inner(step: PlannedStep) -> str:
    inner = step.inner
    order = "first order" if inner.first_order else "second order"
    steps, adapted = counted(inner.steps, "step"), counted(len(inner.adapted), "parameter")
    return f"inner loop: {steps}, {order}; adapting: {adapted}"


def _executors(chosen: Chosen, device: torch.device) -> list[str]:
    if chosen.fused:
        return [f"executor: fused on {device}", f"  kernel: {chosen.fused.words}"]
    not_fused = f"  not fused: {chosen.not_fused or 'estimated slower'}"
    if chosen.layered is None:
        return [f"executor: generic on {device}", not_fused, _not_layered(chosen)]
    if isinstance(chosen.layered, Kernel):
        step = chosen.layered.step
        blocks = counted(step.body, "block")
        return [
            f"executor: layered on {device}",
            f"  kernel: {step.instruction_set}, {blocks} run once",
        ]
    at_once = counted(chosen.layered.chunk, "task")
    body = counted(len(chosen.layered.parts.body), "layer")
    return [
        f"executor: layered on {device}",
        f"  kernel: {chosen.layered.words}, {at_once} at a time, {body} run once",
        f"  not compiled: {chosen.layered.not_compiled}",
        not_fused,
    ]


def _not_layered(chosen: Chosen) -> str:
    if chosen.not_layered or not isinstance(chosen.way, Program):
        return f"  not layered: {chosen.not_layered or 'estimated slower'}"
    return (
        "  not layered: not compiled, because "
        f"{chosen.way.not_compiled}; executor='layered' takes the layers' rules"
    )


def _workspace(chosen: Chosen) -> int:
    if isinstance(chosen.layered, Program):
        return sum(chosen.layered.workspaces)
    if chosen.fused:
        return chosen.fused.storage_bytes
    if chosen.layered:
        return chosen.layered.step.storage_bytes
    return chosen.choice.chunk * cost.task_bytes(chosen.plan.profile, chosen.sizes)


def _group(count: int, chosen: Chosen, several: bool) -> list[str]:
    choice, sizes, profile = chosen.choice, chosen.sizes, chosen.plan.profile
    sizes = replace(sizes, tasks=count)
    where = f"{counted(count, 'task')} of {sizes.support} + {sizes.query} examples"
    once = 0
    if chosen.fused:
        once = chosen.fused.body_flops
    elif chosen.layered:
        once = chosen.layered.body_flops
    at_once = f", {counted(choice.chunk, 'task')} at a time" if choice.form == "vmap" else ""
    lines = [
        f"form{f' for {where}' if several else ''}: {choice.form}{at_once} ({choice.reason})",
        f"  arithmetic: {cost.meta_step_flops(profile, sizes, once):,} FLOP for {where}",
        f"  workspace: about {_workspace(chosen):,} bytes",
    ]
    if chosen.features is not None:
        how = f"at every pass: {chosen.features}" if chosen.features else "once a task and set"
        lines.append(f"  layers in front of the parameters that adapt run {how}")
    lines += [
        f"  not {form}: {reason}"
        for form, reason in chosen.plan.unavailable.items()
        if form != choice.form and reason not in choice.reason
    ]
    return lines
