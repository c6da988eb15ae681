"""What is the same in every call: how the layers divide, and how many tasks go at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastmeta.executors.addresses import in_memory
from fastmeta.executors.layers import many
from fastmeta.executors.layers.joint import Joint
from fastmeta.executors.layers.lowering import Lowered, Parts, divide
from fastmeta.executors.layers.passes import LayerPasses, Passes
from fastmeta.executors.layers.rates import RateGradients
from fastmeta.executors.layers.sweep import Parameters, Result, Sweep
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.network.losses.open import captured
from fastmeta.tasks import Examples, map_tensors

_LARGEST = 4 << 20
"""Bytes of the largest value of the tasks that go at once (docs/design.md, "The layers' rules")."""
_OF_MEMORY = 64
"""On a GPU as much as this part of its memory, which leaves room for what a step keeps: every task
more that goes at once is a launch less."""


@dataclass(frozen=True, eq=False)
class Program:
    """A lowered network for one set of sizes and options."""

    lowered: Lowered
    parts: Parts
    passes: Callable[[Problem, int], Passes]
    """Those of so many tasks of a problem."""
    chunk: int
    """How many tasks go at once."""
    keeps_steps: bool
    """Whether the passes of all inner steps stay until the reverse sweep comes to them."""
    workspaces: tuple[int, ...]
    """Bytes that each layer keeps, by estimate."""
    gives_addresses: bool = False
    """Whether kernels are given the addresses of tensors."""
    joint: Joint | None = None
    """The parameters that adapt under one name, where passes take them so."""

    @property
    def body_flops(self) -> int:
        """Of an example's forward pass through the layers that are run once."""
        return sum(self.lowered.nodes[i].flops for i in self.parts.body)


def program(problem: Problem, lowered: Lowered, gives_addresses: bool = False) -> Program:
    """The program for this problem's sizes and options."""
    adapted = problem.inner.adapted
    parts = divide(lowered, adapted, {*problem.model.parameters(), *adapted})
    tasks, support = problem.tasks, problem.tasks.support
    query = tasks.query.count if tasks.query else 0
    largest = max(node.bytes for node in lowered.nodes) * max(support.count, query)
    most = max(1, _largest(problem.task_weights.device) // max(1, largest))
    chunk = -(-tasks.rounded // -(-tasks.rounded // most))
    keeps = problem.second_order and not problem.low_memory
    passes = problem.inner.steps if keeps else 1
    # Output and gradient; in the head the tangents of both too.
    body = chunk * 2 * (support.count + query)
    head = chunk * 4 * (passes * support.count + query)
    workspaces = tuple(
        node.bytes * (body if i in parts.body else head) for i, node in enumerate(lowered.nodes)
    )
    passes = LayerPasses(lowered.nodes, parts.body, parts.head)
    return Program(lowered, parts, lambda *_: passes, chunk, keeps, workspaces, gives_addresses)


def _largest(device: torch.device) -> int:
    if device.type != "cuda":
        return _LARGEST
    return torch.cuda.get_device_properties(device).total_memory // _OF_MEMORY


def run(problem: Problem, program: Program) -> Outcome:
    """Computes the step, some tasks at a time; an offer was made for its sizes."""
    inner, tasks, module = problem.inner, problem.tasks, problem.model.module
    named = {**problem.model.all_parameters(), **dict(module.named_buffers())}
    if program.gives_addresses:
        named = {name: in_memory(tensor, name) for name, tensor in named.items()}
        tasks = tasks.mapped(_in_memory)
    tensors = {name: tensor.detach().unsqueeze(0) for name, tensor in named.items()}
    joint, swept = program.joint, problem
    if joint is not None:
        tensors, swept = joint.join(tensors), joint.problem(problem)
    rates = RateGradients(swept.inner)
    options: Parameters = {}
    results: list[Result] = []
    totals: Parameters = {}
    with torch.no_grad():
        for start in range(0, tasks.tasks, program.chunk):
            some = slice(start, start + program.chunk)
            weights = problem.task_weights[some]
            passes = program.passes(problem, len(weights))
            sweep = Sweep(
                swept, program.lowered, program.parts, passes, program.keeps_steps, tensors,
                weights, rates,
            )  # fmt: skip
            all_at_once = len(weights) == tasks.tasks
            cut = tasks if all_at_once else tasks.mapped(partial(_cut, some=some))
            result = sweep.run(cut)
            many.add(totals, result.gradients, 1.0)
            many.add(options, result.options, 1.0)
            results.append(result)
            if joint is not None:
                result.adapted = joint.split(result.adapted)
        if joint is not None:
            totals = joint.split(totals)
        outcome = _outcome(problem, results, totals, rates)
        if problem.differentiate:
            learned = inner.learned_options()
            outcome.gradients += [(leaf, options.get(name)) for name, leaf in learned.items()]
            outcome.gradients += captured(loss for each in results for loss in each.open_losses)
        return outcome


def _outcome(
    problem: Problem, results: list[Result], totals: Parameters, rates: RateGradients
) -> Outcome:
    inner, weights = problem.inner, problem.task_weights
    losses = torch.cat([torch.stack(each.step_losses) for each in results], dim=1)
    support = weights.new_empty(0, len(weights))
    if inner.steps:
        support = torch.cat([torch.stack(each.support_losses) for each in results], dim=1)
    outputs = [each.query_output for each in results if each.query_output is not None]
    outcome = Outcome(losses, support, torch.cat(outputs) if outputs else None)
    if problem.keep_adapted:
        parameters = problem.model.parameters()
        outcome.adapted = {
            name: torch.cat([_each(each.adapted[name], each) for each in results])
            for name in inner.adapted
            if name in parameters
        }
    if problem.differentiate:
        outcome.gradients = [
            (parameter, totals[name].squeeze(0) if name in totals else None)
            for name, parameter in problem.model.parameters().items()
        ]
        outcome.gradients += rates.pairs()
    return outcome


def _each(parameter: Tensor, result: Result) -> Tensor:
    """`[T, ...]`, also where no step was taken."""
    return parameter.expand(len(result.step_losses[0]), *parameter.shape[1:])


def _in_memory(examples: Examples) -> Examples:
    return replace(examples, inputs=in_memory(examples.inputs, "x"))


def _cut(examples: Examples, some: slice) -> Examples:
    parts = (examples.inputs, examples.targets, examples.weights)
    inputs, targets, weights = map_tensors(lambda leaf: leaf[some], parts)
    return Examples(inputs, targets, len(inputs), examples.count, weights)
