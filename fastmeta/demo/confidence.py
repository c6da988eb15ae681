"""A mean and how well it is known."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with the half width of its 95 % interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half_width:.2f}"

    def percent(self) -> str:
        """The same in per cent."""
        return f"{100 * self.mean:.1f} ± {100 * self.half_width:.1f} %"


def estimate(values: Tensor) -> Estimate:
    """Estimate the mean of what `values`, [T], are a sample of; 1.96 standard errors each way."""
    error = values.std() / len(values) ** 0.5
    return Estimate(float(values.mean()), 1.96 * float(error))
