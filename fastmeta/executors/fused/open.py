"""The fused executor of MLPs for losses and update rules of any kind, which torch computes."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from functools import partial

import torch

from fastmeta.executors.base import COMPILED, NetworkExecutor, NotSupported, Offer, Unsupported
from fastmeta.executors.extension import extension
from fastmeta.executors.fused import kernel
from fastmeta.executors.fused.cpu import FusedCpu
from fastmeta.executors.fused.lowering import NONE, Dense, dense_layers
from fastmeta.executors.fused.open_passes import DenseLayer, OpenPasses, Run, groups
from fastmeta.executors.kernel_loss import kernel_loss
from fastmeta.executors.layers import lowering, program, support
from fastmeta.executors.layers.joint import NAME, Joint, joint
from fastmeta.executors.layers.lowering import Parts
from fastmeta.executors.problem import Problem
from fastmeta.network.graph import Node
from fastmeta.network.reading import Reading

LOSS = 8e-5
"""Seconds that torch takes for a loss and its derivatives."""
PASS = 3e-5
"""Seconds that the Python around a pass takes."""

_STORAGE = 64 << 20
"""Bytes that the traces of the tasks that go at once may take."""


class FusedOpen(NetworkExecutor):
    """All tasks at once: the network's four passes compiled, what is between them in torch."""

    name = "fused-cpu-open"
    family = "fused"

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        whole = lowering.lower(reading)
        layers = dense_layers(whole.nodes, whole.output)
        if not whole.nodes[whole.output].shape:
            raise NotSupported("open passes predict rows, not numbers")
        if extension() is None:
            raise NotSupported(
                "the compiled extension is not there; `python -m fastmeta info` says why"
            )
        if not isinstance(FusedCpu().offer(reading, problem), Unsupported):
            raise NotSupported(COMPILED)
        support.check(problem, whole)
        dtype, last = problem.task_weights.dtype, layers[-1].outputs
        losses = (reading.loss, reading.query_loss)
        for loss, examples in zip(losses, problem.tasks.sets(), strict=False):
            if loss is not None:
                kernel_loss(loss).check(problem, examples, (last,), dtype)
            if math.prod(examples.inputs.shape[2:]) != layers[0].inputs:
                raise NotSupported("inputs are not one row an example")
        together = joint(problem, tuple(n for layer in layers for n in layer.tensors() if n))
        nodes = _nodes(layers, together)
        swept = problem if together is None else together.problem(problem)
        made = program.program(swept, replace(whole, nodes=nodes, output=len(layers) - 1))
        made = replace(made, parts=_parts(made.parts, layers))
        body, head = _runs(problem, made, layers, together)
        made = replace(
            made, passes=partial(OpenPasses, body, head), chunk=_chunk(problem, body, head),
            joint=together,
        )  # fmt: skip
        tasks, steps = problem.tasks.rounded, problem.inner.steps
        chunks = -(-tasks // made.chunk)
        passes = 2 + steps * (4 if problem.second_order else 2)
        compiled = head.compiled.seconds + (body.compiled.seconds if body else 0.0)
        return Offer(
            executor=self.name,
            form="open",
            seconds=compiled + chunks * (passes * PASS + (2 * steps + 1) * LOSS),
            workspace_bytes=sum(
                run.compiled.storage_bytes(made.chunk) for run in (body, head) if run
            ),
            description=_described(head),
            run=lambda given: program.run(given, made),
            at_a_time=made.chunk,
            body_flops=made.body_flops,
            last_resort=problem.low_memory,  # its memory is that of several tasks
            timeable=True,
            unrecordable="it runs on the processor",
        )


def _described(head: Run) -> str:
    compiled = head.compiled
    return (
        f"{compiled.instruction_set}, lanes over {compiled.engine}, open between its passes, where "
        "torch computes the loss and the inner update"
    )


def _nodes(layers: tuple[Dense, ...], together: Joint | None) -> tuple[Node, ...]:
    of_joint = () if together is None else together.names
    nodes: list[Node] = []
    for layer in layers:
        names = (NAME if name in of_joint else name for name in layer.tensors() if name)
        flops = 2 * layer.inputs * layer.outputs if layer.weight else 0
        nodes.append(
            Node(
                DenseLayer(tuple(dict.fromkeys(names))), layer.reads(), layer.weight or "",
                (layer.outputs,), flops, 8 * layer.outputs,
            )
        )  # fmt: skip
    return tuple(nodes)


def _chunk(problem: Problem, body: Run | None, head: Run) -> int:
    """How many tasks go at once: whole vectors of them, in even chunks within `_STORAGE`."""
    tasks, together = problem.tasks.rounded, head.compiled.together
    each = sum(run.compiled.storage_bytes(together) for run in (body, head) if run)
    most = max(1, _STORAGE // max(1, each)) * together
    chunk = -(-tasks // -(-tasks // most))
    return -(-chunk // together) * together


def _parts(parts: Parts, layers: tuple[Dense, ...]) -> Parts:
    """The same with a body behind which nothing but its last layer is read."""
    border = next(i for i in range(len(layers) + 1) if i in parts.moving or i == len(layers))
    border = min(border, len(layers) - 1)
    while border and any(read < border - 1 for layer in layers[border:] for read in layer.reads()):
        border -= 1
    head = tuple(range(border, len(layers)))
    return replace(parts, body=tuple(range(border)), head=head, border=(border - 1,))


def _runs(
    problem: Problem,
    made: program.Program,
    layers: tuple[Dense, ...],
    together: Joint | None,
) -> tuple[Run | None, Run]:
    """The body, where there is one, and the head."""
    inner, tasks = problem.inner, problem.tasks
    border = len(made.parts.body)
    behind, before = _starting_at(border, layers), layers[:border]
    slots = inner.steps if made.keeps_steps else min(inner.steps, 1)
    sets = inner.steps if tasks.per_step is not None else min(inner.steps, 1)
    query = tasks.query.count if tasks.query else 0
    given = (
        tasks.support.count, query, problem.task_weights.dtype == torch.float64, tasks.rounded,
        *kernel.environment()[:2],
    )  # fmt: skip
    learning = border - 1 in made.parts.learning
    first_order = not problem.second_order
    compiled = _compiled(behind, inner.adapted, slots, first_order, learning, *given)
    head = Run(compiled, behind, groups(behind, problem, together), border, slots)
    if not border:
        return None, head
    compiled = _compiled(before, (), sets, True, False, *given)
    return Run(compiled, before, groups(before, problem, None), 0, sets), head


def _starting_at(border: int, layers: tuple[Dense, ...]) -> tuple[Dense, ...]:
    """The layers from there on, the last one before them being their data."""
    return tuple(
        replace(layer, source=layer.source - border, plus=max(NONE, layer.plus - border))
        for layer in layers[border:]
    )


@functools.lru_cache(maxsize=256)
def _compiled(
    layers: tuple[Dense, ...], adapted: tuple[str, ...], slots: int, first_order: bool,
    inputs_flow: bool, support: int, query: int, is_double: bool, tasks: int, isa: str, engine: str,
) -> object:  # fmt: skip
    module = extension()
    assert module is not None
    described = kernel.described_layers(layers, adapted, is_double)
    programs = module.Programs(*kernel.layer_programs(layers), None, None)
    return module.OpenPasses(
        described, support, query, slots, first_order, inputs_flow, is_double, tasks, isa, engine,
        programs,
    )  # fmt: skip
