"""The progress of a training run: a bar in a terminal, a few plain lines elsewhere."""

import time
from collections.abc import Generator, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

_REFRESH = 0.25  # seconds between two looks at the bar
_PLAIN_LINES = 10


class Progress:
    """Counts iterations, until there are enough or the time is up, and shows how it goes.

    ```python
    progress = Progress("meta-training", iterations=8000, tasks=25)
    for _ in progress:
        ...
        progress.loss(out.loss)
    ```

    **Arguments:** `title`: what is going on. `iterations`: how many at most. `tasks`: tasks an
    iteration. `minutes`: of wall time at most; None is no limit.

    After the loop, `done` is the number of iterations and `seconds` the wall time they took.
    """

    def __init__(
        self, title: str, iterations: int, tasks: int, minutes: float | None = None
    ) -> None:
        self.title = title
        self.iterations = iterations
        self.tasks = tasks
        self.limit = float("inf") if minutes is None else 60 * minutes
        self.done = 0
        self.seconds = 0.0
        self._losses: list[Tensor] = []
        self._mean_loss = float("nan")
        self._note = ""

    @property
    def fraction(self) -> float:
        """How much of the run is behind us, by iterations or by time."""
        return max(self.done / self.iterations, self.seconds / self.limit)

    @property
    def fraction_with_this(self) -> float:
        """The same inside the loop, where the iteration at hand is to be counted too."""
        return max((self.done + 1) / self.iterations, self.seconds / self.limit)

    def loss(self, loss: Tensor) -> None:
        """Take in the loss of one iteration; what is shown is the mean since the last look."""
        self._losses.append(loss.detach())

    def note(self, text: str) -> None:
        """Show `text` from now on."""
        self._note = text

    def __iter__(self) -> Iterator[int]:
        console = Console()
        show = self._bar(console) if console.is_terminal else self._lines(console)
        start = time.perf_counter()
        while self.done < self.iterations and self.seconds < self.limit:
            yield self.done
            self.done += 1
            self.seconds = time.perf_counter() - start
            next(show)
        show.close()

    def _over(self) -> bool:
        return self.fraction >= 1

    def _status(self) -> str:
        # The losses are read here and not at every iteration: on a GPU each reading waits for it.
        if self._losses:
            self._mean_loss = sum(float(loss) for loss in self._losses) / len(self._losses)
            self._losses.clear()
        rate = self.done * self.tasks / self.seconds
        parts = [f"loss {self._mean_loss:.4f}", f"{rate:,.0f} tasks/s", self._note]
        return "  ".join(part for part in parts if part)

    def _lines(self, console: Console) -> Generator[None, None, None]:
        shown = 0
        while True:
            reached = int(self.fraction * _PLAIN_LINES)
            if reached > shown:
                shown = reached
                line = f"{self.title}  {self.done}/{self.iterations}  {self._status()}"
                console.print(line, highlight=False, soft_wrap=True)
            yield

    def _bar(self, console: Console) -> Generator[None, None, None]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Bar(*columns, console=console) as bar:
            task = bar.add_task(self.title, total=self.iterations, status="")
            shown = 0.0
            while True:
                if self.seconds - shown > _REFRESH or self._over():
                    shown = self.seconds
                    bar.update(task, completed=self.done, status=self._status())
                yield
