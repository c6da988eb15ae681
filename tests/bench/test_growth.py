"""How the fused step grows: the count of operations, the smallest run of each section, plots."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import compare, engines, loops, operations
from bench.growth import __main__ as growth
from bench.growth import estimates, floor, forms, memory, plot, sizes, steps, threads
from bench.workloads import Workload, mlp


@pytest.mark.parametrize(
    ("widths", "sizes", "dual", "products"),
    [
        # One product of 1 x 1 matrices: 4 K N + 2 Q of them.
        ((1, 1), (1, 1, 1, 1), False, 6),
        ((2, 3), (1, 5, 7, 2), False, (4 * 2 * 5 + 2 * 7) * 6),
        # The second layer, 3 -> 4: an inner step has 3 + 6 products, the query set 3.
        ((2, 3, 4), (1, 5, 7, 2), False, 54 * 6 + (9 * 2 * 5 + 3 * 7) * 12),
        ((2, 3, 4), (11, 5, 7, 2), False, 11 * (54 * 6 + 111 * 12)),
        # Two products of 12 examples with D H = 6, Grams 5 x 2 x 5 and 7 x 2 x 5, then
        # 3 products of 5 x 5 x 3 and 2 of 7 x 5 x 3.
        ((2, 3), (1, 5, 7, 2), True, 2 * 12 * 6 + 50 + 70 + 3 * 75 + 2 * 105),
        ((2, 3, 4), (2, 5, 7, 1), True, 2 * (144 + 120 + 75 + 210 + (45 + 21) * 12)),
    ],
)
def test_operations_by_hand(widths, sizes, dual, products):
    tasks, support, query, steps = sizes
    count = operations.of_step(widths, tasks, support, query, steps, dual=dual)
    assert count == 2 * products


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("widths", [(6, 4), (6, 5, 4, 3)])
def test_autograd_takes_as_many_operations(widths, steps):
    """Torch's double backward through the loop multiplies no less; its count is its own."""
    workload = Workload("small", lambda: mlp(*widths), widths[-1], widths[:1], 2, 7, 9, steps)
    counter = FlopCounterMode(display=False)
    with counter:
        loops.backward_at_end(*workload.make(), workload.loss_fn, steps, workload.inner_lr)
    assert counter.get_total_flops() == operations.of_step(widths, 2, 7, 9, steps)


def test_a_step_counts_the_form_that_its_kernel_takes():
    workload = steps.at("784-w-10", tasks=2)
    kernel = floor.kernel_of(steps.planned(workload))
    assert kernel.step.form == "dual"
    expected = operations.of_step((784, 64, 10), 2, 10, 150, 5, dual=True)
    assert floor.operations_of(workload, kernel) == expected


def test_the_width_is_that_of_the_hidden_layers():
    for network, widths in (
        ("1-w-w-1", [(8, 1), (8, 8), (1, 8)]),
        ("784-w-10", [(8, 784), (10, 8)]),
    ):
        model, support, _ = steps.at(network, tasks=3, steps=2, width=8).make()
        assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == widths
        assert len(support[0]) == 3


def test_the_floor_is_the_operations_at_the_speed_of_the_best_product():
    records = [
        {"workload": "A", "form": "dual", "engine": "tasks", "operations": 7_000_000,
         "gflops": {"torch.mm": 50.0}, "kernel_ms": 0.2, "whole_ms": 0.5},
        {"workload": "B", "form": "primal", "engine": "features", "operations": 14_000_000,
         "gflops": {"torch.mm": 60.0, "oneDNN linear": 100.0}, "kernel_ms": 0.2, "whole_ms": 0.25},
    ]  # fmt: skip
    first, second = floor.markdown(records).splitlines()[2:4]
    assert first == (
        "| A | dual, tasks | 7.00 | 0.070 | 0.100 | 0.200 | 0.500 | 0.50 | 0.20 | 0.35 | 0.14 |"
    )
    assert second.endswith("| 0.140 | 0.200 | 0.200 | 0.250 | 1.00 | 0.80 | 0.70 | 0.56 |")


def form_record(primal: float, dual: float, taken: str, inputs: int = 16) -> dict:
    return {
        "inputs": inputs, "tasks": 2, "support": 5, "query": 5, "steps": 1, "taken": taken,
        "ms": {"primal": primal, "dual": dual},
    }  # fmt: skip


def test_what_a_wrong_form_costs():
    records = [form_record(1.0, 2.0, "dual"), form_record(3.0, 2.0, "dual", 32)]
    assert [forms.lost(r) for r in records] == [2.0, 1.0]
    text = forms.markdown(records)
    assert "| 2 | 5 | 1 | 5 | **0.50** | **1.50** |" in text
    assert "in 1 of 2 cases, by over 10 % in 1, by 100 % at most" in text


SMALLEST = {
    "floor": lambda: floor.measure("W1b at T=1", 0.01),
    "sizes": lambda: sizes.measure(("1-w-w-1", "tasks", 1), 0.01),
    "memory": lambda: memory.measure(("1-w-w-1", 1)),
    "forms": lambda: forms.measure(engines.Case("", (16, 64, 10), 2, 5, 5, 1), 0.01),
    "estimates": lambda: estimates.measure(steps.at("1-w-w-1", tasks=1), 0.01),
}


@pytest.fixture(scope="module")
def figures():
    """One record a section."""
    return {name: [measure()] for name, measure in SMALLEST.items()}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_case_is_measured_and_printed(name, figures):
    assert json.loads(json.dumps(figures[name])) == figures[name]
    header, rule, row = growth.SECTIONS[name][2](figures[name]).splitlines()[:3]
    assert header.count("|") == rule.count("|") == row.count("|")
    assert "nan" not in row


def test_times_and_memory_are_positive(figures):
    assert min(figures["floor"][0]["kernel_ms"], figures["floor"][0]["whole_ms"]) > 0
    assert set(figures["sizes"][0]["ms"]) == {"fused", "plain loop"}
    assert min(figures["sizes"][0]["ms"].values()) > 0
    assert set(figures["memory"][0]["megabytes"]) == set(memory.CONTENDERS)
    assert min(figures["memory"][0]["megabytes"].values()) >= 0


def test_two_threads_only_where_there_are_two_cores(monkeypatch, capsys):
    # In this process: a fresh one imports the checkout, which may have no compiled extension.
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        threads.main()
        return json.loads(capsys.readouterr().out)

    before = torch.get_num_threads()
    monkeypatch.setattr(threads.processes, "in_fresh_process", run)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert threads.measure(["W1"], 0.01, 1) == []
    assert threads.markdown([]) == "This machine has one core."
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    (found,) = threads.measure(["W1"], 0.01, 1)
    torch.set_num_threads(before)
    assert set(found["ms"]) == {"1", "2"}
    assert found["workload"] in threads.markdown([found])


def test_the_tables_of_a_run_have_its_sections(figures):
    text = growth.tables({"sections": {"forms": figures["forms"], "floor": figures["floor"]}})
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "### Fraction of the floor", "### Crossover of primal and dual",
    ]  # fmt: skip


def full_run() -> dict[str, list[dict]]:
    """Made-up figures of all points: what the largest pictures are of."""
    return {
        "floor": [
            {"workload": name, "operations": 10**9, "gflops": {"torch.mm": 99.0}, "kernel_ms": 12.0,
             "whole_ms": 13.0}
            for name in compare.MLPS
        ],
        "sizes": [
            {"network": network, "varies": varies, "value": value,
             "ms": {"fused": 0.1 * value, "plain loop": 3.0 * value}}
            for network, varies, value in sizes.points(False)
        ],
        "memory": [
            {"network": network, "tasks": tasks,
             "megabytes": {name: tasks / (4 + i) for i, name in enumerate(memory.CONTENDERS)}}
            for network, tasks in memory.points(False)
        ],
        "forms": [
            form_record(1 + c.support * c.steps * c.widths[0] / 500, 2.0, "dual", c.widths[0])
            | {"tasks": c.tasks, "support": c.support, "query": c.query, "steps": c.steps,
               "per_step": c.per_step}
            for c in forms.cases(False)
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", plot.PLOTS)
def test_pictures_are_drawn_and_small(name, figures, tmp_path):
    for count, records in enumerate((figures[name], full_run()[name])):
        path = tmp_path / "deep" / f"{name}-{count}.png"
        plot.PLOTS[name](records, path, "title")
        assert 1000 < path.stat().st_size < 60_000


def test_the_grids_have_the_sizes_asked_for():
    assert ("1-w-w-1", "tasks", 10000) in sizes.points(False)
    assert ("784-w-10", "width", 1024) in sizes.points(False)
    assert set(sizes.points(True)) < set(sizes.points(False))
    assert {c.widths[0] for c in forms.cases(False)} == {16, 32, 64, 128, 256, 512, 1024}
    assert set(forms.cases(True)) < set(forms.cases(False))
