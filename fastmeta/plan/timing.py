"""Times offers, once a reading: what an estimate leaves out is in the figure."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from fastmeta.executors.base import Executor, Offer
from fastmeta.executors.every import REFERENCE
from fastmeta.executors.problem import Problem
from fastmeta.network.random_state import same_random_numbers
from fastmeta.network.reading import Reading

_ENOUGH = 0.02
"""Seconds after which an offer is not run again; the shortest of its runs counts."""


def may_time(problem: Problem) -> bool:
    """Return whether executors may be chosen by the clock: random numbers do not depend on it."""
    return not problem.draws_random and not torch.are_deterministic_algorithms_enabled()


def factor(reading: Reading, problem: Problem, executor: Executor, keeps_features: bool) -> float:
    """The seconds of an offer over its estimate, on as many tasks as it takes at a time."""
    whole = executor.offer(reading, problem)
    assert isinstance(whole, Offer)
    tasks = 2 if executor is REFERENCE else whole.at_a_time
    small = replace(problem.shortened(tasks, steps=2), keeps_features=keeps_features)
    offer = executor.offer(reading, small)
    if not isinstance(offer, Offer):  # of a single task
        small, offer = problem, whole

    device = problem.task_weights.device
    # Beside other processes, what takes longer than a slice of time looks longer still.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter

    def once() -> float:
        start = clock()
        offer.run(small)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    with same_random_numbers(device):  # a rule of the user's own may draw
        once()
        times = [once()]
        while sum(times) < _ENOUGH:
            times.append(once())
    return min(times) / offer.seconds
