"""N-way K-shot episodes, drawn on the device from images that are already in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.data.drawing import draw_without_replacement
from fastmeta.data.generator import require_positive, seeded_generator

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Pool:
    """All examples, class after class."""

    examples: Tensor  # [M, ...]
    labels: Tensor  # [C], what the caller calls each class
    counts: Tensor  # [C], examples of each class

    def require(self, ways: int, shots: int, queries: int) -> None:
        """Complain unless tasks of this size can be drawn."""
        require_positive("ways", ways)
        require_positive("shots", shots)
        require_positive("queries", queries)
        if ways > len(self.counts):
            raise ValueError(
                f"ways: {ways}, but there are only {len(self.counts)} classes to draw from"
            )
        smallest = int(self.counts.argmin())
        if shots + queries > self.counts[smallest]:
            raise ValueError(
                f"shots + queries: {shots} + {queries} = {shots + queries}, but class "
                f"{int(self.labels[smallest])} has only {int(self.counts[smallest])} examples, and "
                "none is drawn twice in a task; take fewer, or leave that class out"
            )


class Episodes:
    """Draws batches of few-shot classification tasks.

    Within a task no class occurs twice, and no example, neither in the support nor in the query
    set. The classes of a task are numbered 0 … ways - 1 anew, in random order. All tasks of a batch
    are drawn at once, on the device that holds the images, without worker processes.

    **Arguments:**

    - `images`: [C, E, ...], E examples of each of C classes. uint8 is the compact way to keep
      images: they are converted as they are drawn. For classes of different sizes see
      `Episodes.from_labels`.
    - `ways`: classes a task. `shots`, `queries`: support and query examples of each of them.
    - `seed`: the same seed gives the same episodes on the same kind of device; None draws a
      fresh one.
    - `rotations`: turn each drawn class by 0, 90, 180 or 270 degrees, at random, as MAML did in
      training; needs square images and keeps four copies of them. (`rotated_classes` makes the
      turned classes once and for all; a task may then hold one character twice, turned.)
    - `dtype`: what uint8 and floating-point images become. Other integers (token ids) stay as
      they are.
    - `scale`: factor put on the converted images; None is 1/255 for uint8 and 1 otherwise.

    **Raises:** `ValueError` where there are fewer classes than `ways`, or fewer examples in a class
    than `shots + queries`.
    """

    def __init__(
        self,
        images: Tensor,
        ways: int,
        shots: int,
        queries: int,
        seed: int | None = None,
        rotations: bool = False,
        dtype: torch.dtype = torch.float32,
        scale: float | None = None,
    ) -> None:
        if images.dim() < 2:
            raise ValueError(
                f"images: shape {list(images.shape)}; it must be [classes, examples, ...]. "
                "For examples with labels, use Episodes.from_labels"
            )
        labels = torch.arange(len(images), device=images.device)  # [C]
        counts = torch.full_like(labels, images.shape[1])  # [C]
        pool = _Pool(images.flatten(0, 1), labels, counts)
        self._prepare(pool, ways, shots, queries, seed, dtype, scale)
        if rotations:
            self._turns = 4
            self._examples = rotated_classes(images).flatten(0, 1).flatten(1)  # [4M, D]

    @classmethod
    def from_labels(
        cls,
        x: Tensor,
        y: Tensor,
        ways: int,
        shots: int,
        queries: int,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
        scale: float | None = None,
    ) -> "Episodes":
        """Draw from examples with labels, where classes may have different numbers of examples.

        **Arguments:** `x`: [M, ...]. `y`: integer [M], any values: each different one is a class.
        The examples are copied once, class by class. The others as in `Episodes`.

        **Returns:** an `Episodes`.

        **Raises:** `ValueError` as in `Episodes`, and where `x` and `y` do not belong together.
        """
        if y.dim() != 1 or y.is_floating_point() or len(y) == 0:
            raise ValueError(
                f"y: {y.dtype} of shape {list(y.shape)}; it must be integers, one a row of x"
            )
        if x.dim() < 1 or len(x) != len(y):
            raise ValueError(
                f"y: {len(y)} labels, but x has shape {list(x.shape)}; one label a row"
            )
        y = y.to(x.device)
        labels, counts = torch.unique(y, return_counts=True)  # [C], [C]
        pool = _Pool(x[y.argsort(stable=True)], labels, counts)
        episodes = cls.__new__(cls)
        episodes._prepare(pool, ways, shots, queries, seed, dtype, scale)
        return episodes

    def _prepare(
        self,
        pool: _Pool,
        ways: int,
        shots: int,
        queries: int,
        seed: int | None,
        dtype: torch.dtype,
        scale: float | None,
    ) -> None:
        pool.require(ways, shots, queries)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: {dtype}; it must be a floating-point type")
        stored = pool.examples.dtype
        self._converts = stored == torch.uint8 or stored.is_floating_point
        if scale is None:
            scale = 1 / 255 if stored == torch.uint8 else 1.0
        elif not self._converts:
            raise ValueError(f"scale: {scale}, but {stored} examples are handed out as they are")
        self.ways, self.shots, self.queries = ways, shots, queries
        self.dtype = dtype
        self.scale = scale
        self.generator = seeded_generator(seed, pool.examples.device)
        self._shape = pool.examples.shape[1:]
        self._examples = pool.examples.reshape(len(pool.examples), -1)  # [M, D]
        self._counts = pool.counts  # [C]
        self._starts = pool.counts.cumsum(0) - pool.counts  # [C], first row of each class
        self._numbers = torch.arange(ways, device=pool.examples.device)  # [ways]
        self._turns = 1

    def sample(self, tasks: int) -> tuple[Examples, Examples]:
        """Draw a batch of tasks.

        **Arguments:** `tasks`: how many, T.

        **Returns:** `(support, query)`, each `(x, y)`. x: [T, ways * shots, ...] and
        [T, ways * queries, ...]; y: the class in the task, int64 [T, ways * shots] and
        [T, ways * queries]. Examples of one class stand together.
        """
        require_positive("tasks", tasks)
        populations = torch.full((tasks,), len(self._counts), device=self._counts.device)
        classes = draw_without_replacement(populations, self.ways, self.generator)  # [T, ways]
        classes = classes.flatten()  # [T * ways]
        drawn = draw_without_replacement(
            self._counts[classes], self.shots + self.queries, self.generator
        )
        rows = self._starts[classes, None] + drawn  # [T * ways, shots + queries]
        if self._turns > 1:
            turns = torch.randint(
                self._turns, (len(rows), 1), generator=self.generator, device=rows.device
            )
            rows += turns * (len(self._examples) // self._turns)
        support = self._gather(rows[:, : self.shots], tasks)
        query = self._gather(rows[:, self.shots :], tasks)
        return support, query

    def _gather(self, rows: Tensor, tasks: int) -> Examples:
        per_class = rows.shape[1]
        x = self._examples.index_select(0, rows.flatten())  # [T * ways * per_class, D]
        if self._converts:
            x = x.to(self.dtype)
        if self.scale != 1:
            x.mul_(self.scale)  # in place: a second buffer of this size costs more than the product
        y = self._numbers.repeat_interleave(per_class).repeat(tasks, 1)  # [T, ways * per_class]
        return x.view(tasks, self.ways * per_class, *self._shape), y


def rotated_classes(images: Tensor) -> Tensor:
    """Make new classes by turning every class by 90, 180 and 270 degrees.

    **Arguments:** `images`: [C, E, ..., H, W], with H = W.

    **Returns:** [4C, E, ..., H, W]; class `turn * C + c` is class c turned by `turn` quarters,
    counter-clockwise.

    **Raises:** `ValueError` where the images are not square.

    **Source:** Santoro et al. (2016), Meta-Learning with Memory-Augmented Neural Networks.
    """
    if images.dim() < 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"images: shape {list(images.shape)}; to be turned they must be "
            "[classes, examples, height, width] with height = width"
        )
    return torch.cat([torch.rot90(images, turn, (-2, -1)) for turn in range(4)])
