"""Which of the two computes a problem: the compiled step where it can, else the layers' rules."""

from __future__ import annotations

from fastmeta.executors.layered import cpu, program
from fastmeta.executors.layered.cpu import Kernel
from fastmeta.executors.layered.program import Program
from fastmeta.executors.layered.recipe import Recipe
from fastmeta.executors.problem import Outcome, Problem

Way = Kernel | Program


def way(
    problem: Problem,
    recipe: Recipe,
    not_compiled: str | None,
    low_memory: bool = False,
    not_triton: str | None = None,
) -> Way:
    """What computes this problem; `declines` must have found nothing.

    `not_compiled` is why the compiled step does not take it, None where it does; `not_triton` why
    the layers' rules should leave Triton's kernels alone, None where they need not.
    """
    problem = problem.read
    if not_compiled is None:
        assert not isinstance(recipe.blocks, str)
        return cpu.kernel(problem, recipe.blocks)
    return program.program(problem, recipe, not_compiled, not_triton, low_memory)


def run(problem: Problem, way: Way) -> Outcome:
    """Computes the step. **Raises** `WrongLabel`, from the compiled step."""
    read = problem.read
    outcome = cpu.run(read, way) if isinstance(way, Kernel) else program.run(read, way)
    return problem.completed(outcome)
