"""Where the matrices of a step lie in one buffer."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class View:
    """A matrix in the buffer: of every task, `task` numbers apart, or shared (`task` is 0)."""

    offset: int
    task: int
    rows: int
    cols: int
    row: int
    """From one row to the next; 0 repeats one."""
    col: int

    @property
    def turned(self) -> View:
        """Its transpose."""
        return replace(self, rows=self.cols, cols=self.rows, row=self.col, col=self.row)

    def repeated(self, rows: int) -> View:
        """A row [1, H], or a number, as so many rows."""
        assert self.rows == 1
        return replace(self, rows=rows, row=0)

    def throughout(self, rows: int, cols: int) -> View:
        """A number [1, 1] as a matrix of it."""
        assert (self.rows, self.cols) == (1, 1)
        return replace(self, rows=rows, cols=cols, row=0, col=0)

    def like(self, other: View) -> View:
        """A number [1, 1] as a matrix as large as the other."""
        return self.throughout(other.rows, other.cols)

    @property
    def flat(self) -> View:
        """All of it as one row."""
        return replace(self, rows=1, cols=self.rows * self.cols, row=0, col=1)

    def part(self, start: int, rows: int, cols: int) -> View:
        """Of a row [1, P] the numbers from `start` on, as a matrix."""
        assert self.rows == 1
        return replace(self, offset=self.offset + start, rows=rows, cols=cols, row=cols, col=1)

    def below(self, start: int, rows: int) -> View:
        """Some of its rows."""
        return replace(self, offset=self.offset + start * self.row, rows=rows)

    def at(self, row: int, col: int = 0) -> View:
        """One number of it."""
        offset = self.offset + row * self.row + col * self.col
        return replace(self, offset=offset, rows=1, cols=1, row=0, col=0)


class Space:
    """The buffer, handed out from its start on."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.size = 0

    def shared(self, rows: int, cols: int) -> View:
        """A matrix that all tasks share."""
        return self._take(rows, cols, 0, 1)

    def of_tasks(self, rows: int, cols: int) -> View:
        """A matrix of each task's own, as a tensor [T, rows, cols]."""
        return self._take(rows, cols, rows * cols, self.tasks)

    def _take(self, rows: int, cols: int, task: int, count: int) -> View:
        view = View(self.size, task, rows, cols, cols, 1)
        self.size += rows * cols * count
        return view
