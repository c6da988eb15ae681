"""The lines of `bench.cliffs`: each a steady call, and the same under a change or beside a twin."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta
from bench import measure
from bench.cliff_networks import (
    Chain,
    CleanChild,
    Recurrent,
    WithAuxiliaryHead,
    WithFlag,
    with_dropout,
    with_group_norm,
)
from bench.executors import leaving
from bench.workloads import WORKLOADS, Pair, Workload

PER_CALL, OTHERWISE = 1.3, 1.1
"""The largest ratio that is no cliff."""

Call = Callable[[], Any]


class Calls(NamedTuple):
    """The timed calls: whole meta-steps, backward included; each returns a `MetaStep` or a loss."""

    steady: Call
    changed: Call


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    target: float
    make: Callable[[], Calls]
    calls: int | None = None
    """The number of calls, where there are only so many."""
    same: bool = True
    """True where both compute the same loss, which is then checked."""


IMAGES = replace(WORKLOADS["W5"], name="conv4")
CLASSES = replace(WORKLOADS["W4"], name="300-64-3")


def whole(
    workload: Workload, model: nn.Module, support: Pair, query: Pair, **options: Any
) -> Callable[..., Any]:
    """A step with its backward; what it is called with goes before `options`."""
    fixed = {
        "inner_lr": workload.inner_lr, "inner_steps": workload.steps, "loss_fn": workload.loss_fn,
        **options,
    }  # fmt: skip

    def step(sets: tuple[Pair, Pair] = (support, query), **changing: Any) -> Any:
        model.zero_grad()
        out = fastmeta.maml_step(model, *sets, **{**fixed, **changing})
        out.loss.backward()
        return out

    return step


def made(workload: Workload, **options: Any) -> tuple[Any, Callable[..., Any]]:
    """The model and its step; the same numbers at every call."""
    model, support, query = workload.make()
    return model, whole(workload, model, support, query, **options)


def unread_attribute(workload: Workload) -> Calls:
    """A counter on the model that its forward does not read."""
    model, step = made(workload)
    model.step = 0

    def counting() -> Any:
        model.step += 1
        return step()

    return Calls(made(workload)[1], counting)


def new_loss(steady: Any, losses: Callable[[Tensor], Any]) -> Calls:
    """Another loss at every call, made of a number that shrinks."""
    step = made(CLASSES)[1]
    numbers = (torch.tensor(0.1 * 0.999**i) for i in itertools.count(1))
    return Calls(
        functools.partial(made(CLASSES)[1], loss_fn=steady),
        lambda: step(loss_fn=losses(next(numbers))),
    )


def smoothing_of_a_module() -> Calls:
    """One `nn.CrossEntropyLoss` whose attribute is set at every call."""
    module = nn.CrossEntropyLoss(label_smoothing=0.1)

    def smoothed(number: Tensor) -> nn.Module:
        module.label_smoothing = float(number)
        return module

    return new_loss(nn.CrossEntropyLoss(label_smoothing=0.1), smoothed)


def smoothing_of_a_partial() -> Calls:
    """A new partial at every call."""

    def smoothed(number: Tensor) -> Any:
        return functools.partial(F.cross_entropy, label_smoothing=float(number))

    return new_loss(smoothed(torch.tensor(0.1)), smoothed)


def smoothing_of_a_lambda() -> Calls:
    """A new lambda at every call, whose constant is another."""

    def smoothed(number: Tensor) -> Any:
        smoothing = float(number)
        return lambda p, y: F.cross_entropy(p, y, label_smoothing=smoothing)

    return new_loss(smoothed(torch.tensor(0.1)), smoothed)


def _weights(number: Tensor) -> Tensor:
    return torch.stack([number, 1 + number, 2 + number])


def weights_of_a_module() -> Calls:
    """A new loss module with a new weight at every call."""
    fixed = nn.CrossEntropyLoss(weight=_weights(torch.tensor(0.1)))
    return new_loss(fixed, lambda number: nn.CrossEntropyLoss(weight=_weights(number)))


def weights_of_a_lambda() -> Calls:
    """A lambda that captures a new weight at every call, beside a loss module with a fixed one."""

    def weighted(number: Tensor) -> Any:
        weight = _weights(number)
        return lambda p, y: F.cross_entropy(p, y, weight=weight)

    return new_loss(nn.CrossEntropyLoss(weight=_weights(torch.tensor(0.1))), weighted)


def annealed_slope() -> Calls:
    """The slope of a leaky ReLU set at every call."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(300, 64), nn.LeakyReLU(0.1), nn.Linear(64, 3))

    workload = replace(CLASSES, network=network)
    model, step = made(workload)

    def annealing() -> Any:
        model[1].negative_slope *= 0.999
        return step()

    return Calls(made(workload)[1], annealing)


NEW_TASKS = 150


def number_of_tasks(counts: list[int], rounds: int) -> Calls:
    """Another number of tasks at every call, beside their mean."""
    mean = round(sum(counts) / len(counts))
    _, support, query = WORKLOADS["W1"].with_tasks(max(counts)).make()
    order = [counts[i] for i in torch.randperm(len(counts)).tolist()] * rounds
    numbers = iter(order)
    step = made(WORKLOADS["W1"])[1]

    def first(count: int) -> tuple[Pair, Pair]:
        return (support[0][:count], support[1][:count]), (query[0][:count], query[1][:count])

    return Calls(
        functools.partial(made(WORKLOADS["W1"])[1], first(mean)),
        lambda: step(first(next(numbers))),
    )


def twins(network: Callable[[], nn.Module]) -> Calls:
    """A network beside the plain one that computes the same."""
    plain, other = (made(replace(CLASSES, network=make))[1] for make in (Chain, network))
    return Calls(plain, other)


def fastest(calls: dict[str, Call], auto: Call) -> Calls:
    """The fastest of several, by three calls of each in turn."""
    times = measure.interleaved(calls, 0.0, 3)
    return Calls(calls[min(times, key=lambda name: times[name])], auto)


def group_norm() -> Calls:
    """The time of `auto` beside the faster of the two executors that serve."""
    workload = replace(IMAGES, network=lambda: with_group_norm(IMAGES.network()))
    executors = {name: made(workload, executor=name)[1] for name in ("generic", "layered")}
    return fastest(executors, made(workload)[1])


def forms(workload: Workload) -> Calls:
    """The general path's time beside the faster of loop and vmap."""
    calls: dict[str, Call] = {}
    for form in ("loop", "vmap"):
        calls[form] = made(workload, executor="generic")[1]
        with leaving(form.__eq__):  # raises where it can't serve
            calls[form]()
    return fastest(calls, made(workload, executor="generic")[1])


SEQUENCES = Workload("LSTM", Recurrent, 5, (12, 8), 4, 10, 15, 5, 0.1)


def frozen_body() -> Calls:
    """ANIL on the general path beside a loop that runs the body once."""
    model, support, query = SEQUENCES.make()
    head, rate = dict(model.head.named_parameters()), SEQUENCES.inner_lr

    def loop() -> Tensor:
        model.zero_grad()
        losses: list[Tensor] = []
        for sx, sy, qx, qy in zip(*support, *query, strict=True):
            support_features, query_features = (model.body(x)[0][:, -1] for x in (sx, qx))
            phi: dict[str, Tensor] = dict(head)
            for _ in range(SEQUENCES.steps):
                loss = F.cross_entropy(functional_call(model.head, phi, (support_features,)), sy)
                slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
                phi = {n: p - rate * g for (n, p), g in zip(phi.items(), slopes, strict=True)}
            losses.append(F.cross_entropy(functional_call(model.head, phi, (query_features,)), qy))
        total = torch.stack(losses).mean()
        total.backward()
        return total

    return Calls(loop, made(SEQUENCES, adapt="head")[1])


LINES = [
    Line("model.step += 1, W1", PER_CALL, lambda: unread_attribute(WORKLOADS["W1"])),
    Line("model.step += 1, conv4", PER_CALL, lambda: unread_attribute(IMAGES)),
    Line("label smoothing annealed: module", PER_CALL, smoothing_of_a_module, same=False),
    Line("label smoothing annealed: partial", PER_CALL, smoothing_of_a_partial, same=False),
    Line("label smoothing annealed: lambda", PER_CALL, smoothing_of_a_lambda, same=False),
    Line("slope of leaky ReLU annealed", PER_CALL, annealed_slope, same=False),
    Line("class weights anew: module", PER_CALL, weights_of_a_module, same=False),
    Line("class weights anew: lambda", PER_CALL, weights_of_a_lambda, same=False),
    Line("a number of tasks never seen, W1", PER_CALL,
         lambda: number_of_tasks(list(range(5, 5 + NEW_TASKS + 1)), 1), NEW_TASKS, False),
    Line("30 numbers of tasks in turn, W1", PER_CALL,
         lambda: number_of_tasks(list(range(10, 40)), 20), 570, False),
    Line("a head that nothing reads", OTHERWISE, lambda: twins(WithAuxiliaryHead)),
    Line("Dropout(p=0.) in train()", OTHERWISE, lambda: twins(with_dropout)),
    Line("forward(x, return_features=False)", OTHERWISE, lambda: twins(WithFlag)),
    Line("a clean forward over an unwatchable base", OTHERWISE, lambda: twins(CleanChild)),
    Line("group norm, conv4: auto", OTHERWISE, group_norm),
    Line("loop or vmap as estimated, W1", OTHERWISE, lambda: forms(WORKLOADS["W1"])),
    Line("loop or vmap as estimated, W2", OTHERWISE, lambda: forms(WORKLOADS["W2"])),
    Line("loop or vmap as estimated, W4", OTHERWISE, lambda: forms(WORKLOADS["W4"])),
    Line("ANIL over an LSTM, beside kept features", OTHERWISE, frozen_body),
]  # fmt: skip
THREADED = ("W1", "W4", "W1b at T=1")
"""Workloads that are timed with two threads beside one, each in a process of its own."""
