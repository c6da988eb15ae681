"""The sinusoid regression tasks of the MAML paper."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.data.generator import require_positive, seeded_generator

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, math.pi)
INPUTS = (-5.0, 5.0)

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SinusoidTasks:
    """The curves of T tasks: `tasks(x)` is `amplitude * sin(x - phase)`, task by task."""

    amplitude: Tensor  # [T]
    phase: Tensor  # [T]

    def __len__(self) -> int:
        return len(self.amplitude)

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate every task's curve.

        **Arguments:** `x`: [T, N, 1], or [N, 1] for the same points in every task.

        **Returns:** [T, N, 1].
        """
        amplitude = self.amplitude[:, None, None]  # [T, 1, 1]
        phase = self.phase[:, None, None]  # [T, 1, 1]
        return amplitude * torch.sin(x - phase)


class Sinusoid:
    """Draws regression tasks: amplitude from U(0.1, 5), phase from U(0, pi), x from U(-5, 5).

    **Arguments:**

    - `shots`: support examples a task.
    - `queries`: query examples a task.
    - `seed`: the same seed gives the same tasks; None draws a fresh one.
    - `device`, `dtype`: of everything handed out.

    **Raises:** `ValueError` for `shots` or `queries` below 1.

    **Source:** Finn, Abbeel, Levine (2017), Model-Agnostic Meta-Learning, section 5.1.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        require_positive("shots", shots)
        require_positive("queries", queries)
        self.shots = shots
        self.queries = queries
        self.dtype = dtype
        self.generator = seeded_generator(seed, device)

    def draw(self, tasks: int) -> SinusoidTasks:
        """Draw the amplitudes and phases of `tasks` tasks, without examples."""
        require_positive("tasks", tasks)
        return SinusoidTasks(
            amplitude=self._uniform(AMPLITUDES, tasks), phase=self._uniform(PHASES, tasks)
        )

    def sample(self, tasks: int | SinusoidTasks) -> tuple[Examples, Examples]:
        """Draw the support and query examples of a batch of tasks.

        **Arguments:** `tasks`: how many new tasks to draw; or tasks from `draw`, where the curves
        themselves are wanted too.

        **Returns:** `(support, query)`, each `(x, y)`: [T, shots, 1] and [T, queries, 1].
        """
        curves = tasks if isinstance(tasks, SinusoidTasks) else self.draw(tasks)
        x = self._uniform(INPUTS, len(curves), self.shots + self.queries, 1)  # [T, N + Q, 1]
        y = curves(x)
        support = (x[:, : self.shots].contiguous(), y[:, : self.shots].contiguous())
        query = (x[:, self.shots :].contiguous(), y[:, self.shots :].contiguous())
        return support, query

    def _uniform(self, bounds: tuple[float, float], *shape: int) -> Tensor:
        values = torch.empty(shape, dtype=self.dtype, device=self.generator.device)
        return values.uniform_(*bounds, generator=self.generator)
