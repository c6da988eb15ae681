"""Tracing: what a Python function computes of symbols, as an expression.

A symbol answers torch's functions and methods by their names (`vocabulary`), so that any function
of the user's that only computes runs on symbols as it runs on tensors. Its shape is that of the
tensor it stands for, but for the number of examples, with which nothing can be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.network.expressions.expression import Expression, constant, held, operate

EXAMPLES = "n"
"""The axis of the examples."""
Axes = tuple[Any, ...]
"""The sizes of a shape; `EXAMPLES` for the number of examples."""


class Untraceable(BaseException):
    """A function that is no expression; the message says what it does.

    No `Exception`, which the user's own code may catch to go another way.
    """


class _Examples:
    """The number of examples, in a shape: it may be passed on, and nothing else."""

    def __repr__(self) -> str:
        return "N"

    def _refuse(self, *_: Any) -> Any:
        raise Untraceable("it computes with the number of examples")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __index__ = __bool__ = __neg__ = (
        _refuse
    )
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other or self._refuse()


COUNT_OF_EXAMPLES = _Examples()


def axes_of(sizes: Iterable[Any]) -> Axes:
    """Sizes that the user's code gives, as axes."""
    return tuple(EXAMPLES if size is COUNT_OF_EXAMPLES else size for size in sizes)


@dataclass
class Trace:
    """One tracing of a function."""

    dtype: torch.dtype
    """The type of the numbers that it computes."""
    assumes_many: bool = False
    """Whether it holds for more than one example alone."""


class Symbol:
    """A tensor's stand-in. `is_mean` says that it is the mean over examples of its expression."""

    allowed: frozenset[str] | None = None
    """The names of the functions that it answers; all of the vocabulary where None."""

    def __init__(
        self, expression: Expression, axes: Axes, trace: Trace, is_mean: bool = False,
        is_number: bool = False, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if not torch.is_grad_enabled():
            expression = held(expression)
        self.trace, self.is_number = trace, is_number
        """Whether it stands for a number of Python's rather than for a tensor."""
        self.dtype = trace.dtype if dtype is None else dtype
        self.expression, self.axes, self.is_mean = expression, axes, is_mean

    def like(self, expression: Expression, axes: Axes, is_mean: bool = False) -> Symbol:
        """A symbol of the same tracing."""
        return type(self)(expression, axes, self.trace, is_mean)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return answer(function.__name__, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in _answers():
            raise Untraceable(f"it reads {name!r} of a tensor")
        return lambda *args, **kwargs: answer(name, (self, *args), kwargs)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the tensor."""
        return tuple(COUNT_OF_EXAMPLES if axis == EXAMPLES else axis for axis in self.axes)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.axes)

    @property
    def device(self) -> torch.device:
        """The processor's, where symbols are traced."""
        return torch.device("cpu")

    def __len__(self) -> int:
        if not self.axes or self.axes[0] == EXAMPLES:
            raise Untraceable("it computes with the number of examples")
        return self.axes[0]

    def __bool__(self) -> bool:
        raise Untraceable("it branches on a tensor's values")

    def __iter__(self) -> Any:
        raise Untraceable("it goes through a tensor's rows")

    def __float__(self) -> float:
        raise Untraceable("it takes a number out of a tensor")

    def __int__(self) -> int:
        raise Untraceable("it takes a number out of a tensor")

    __index__ = __int__
    __hash__ = object.__hash__

    def __getitem__(self, index: Any) -> Any:
        return answer("getitem", (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        raise Untraceable("it writes into a tensor")

    def __add__(self, other: Any) -> Symbol:
        return answer("add", (self, other), {})

    def __sub__(self, other: Any) -> Symbol:
        return answer("sub", (self, other), {})

    def __mul__(self, other: Any) -> Symbol:
        return answer("mul", (self, other), {})

    def __truediv__(self, other: Any) -> Symbol:
        return answer("div", (self, other), {})

    def __pow__(self, other: Any) -> Symbol:
        return answer("pow", (self, other), {})

    def __lt__(self, other: Any) -> Symbol:
        return answer("lt", (self, other), {})

    def __le__(self, other: Any) -> Symbol:
        return answer("le", (self, other), {})

    def __gt__(self, other: Any) -> Symbol:
        return answer("gt", (self, other), {})

    def __ge__(self, other: Any) -> Symbol:
        return answer("ge", (self, other), {})

    def __and__(self, other: Any) -> Symbol:
        return answer("and", (self, other), {})

    def __or__(self, other: Any) -> Symbol:
        return answer("or", (self, other), {})

    def __radd__(self, other: Any) -> Symbol:
        return answer("add", (other, self), {})

    def __rsub__(self, other: Any) -> Symbol:
        return answer("sub", (other, self), {})

    def __rmul__(self, other: Any) -> Symbol:
        return answer("mul", (other, self), {})

    def __rtruediv__(self, other: Any) -> Symbol:
        return answer("div", (other, self), {})

    def __rpow__(self, other: Any) -> Symbol:
        return answer("pow", (other, self), {})

    def __iadd__(self, other: Any) -> Symbol:
        return self._changed(answer("add", (self, other), {}))

    def __isub__(self, other: Any) -> Symbol:
        return self._changed(answer("sub", (self, other), {}))

    def __imul__(self, other: Any) -> Symbol:
        return self._changed(answer("mul", (self, other), {}))

    def __itruediv__(self, other: Any) -> Symbol:
        return self._changed(answer("div", (self, other), {}))

    def _changed(self, result: Symbol) -> Symbol:
        """This symbol with another's value: so an operator in place is seen by all that hold it."""
        if not self.is_mean or result.axes != self.axes:  # a tensor may be seen through views
            raise Untraceable("it changes a tensor in place")
        self.expression = result.expression
        return self

    def __eq__(self, other: Any) -> Any:
        return answer("eq", (self, other), {})

    def __ne__(self, other: Any) -> Any:
        return answer("ne", (self, other), {})

    def __neg__(self) -> Symbol:
        return answer("neg", (self,), {})

    def __abs__(self) -> Symbol:
        return answer("abs", (self,), {})

    def __invert__(self) -> Symbol:
        return answer("invert", (self,), {})

    def __pos__(self) -> Symbol:
        return answer("pos", (self,), {})


def _answers() -> dict[str, Callable[..., Any]]:
    from fastmeta.network.expressions.vocabulary import ANSWERS  # which is written with symbols

    return ANSWERS


def answer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of torch's gives of symbols."""
    found = _answers().get(name)
    for argument in args:
        if isinstance(argument, Symbol) and argument.allowed and name not in argument.allowed:
            found = None
    if found is None:
        raise Untraceable(f"it calls {name}, which no expression has")
    try:
        return found(*args, **kwargs)
    except TypeError as error:
        if found.__name__ not in str(error):
            raise
        raise Untraceable(f"it calls {name} with arguments that no expression has") from error


def symbol(value: Any, like: Symbol) -> Symbol:
    """A number, or a tensor of one number, as a symbol."""
    if isinstance(value, Symbol):
        return value
    if isinstance(value, Tensor):
        if value.requires_grad or value.numel() != 1:
            raise Untraceable("it computes with a tensor made inside it")
        return like.like(constant(float(value)), (1,) * value.dim())
    if isinstance(value, (bool, int, float)):
        number = like.like(constant(float(value)), ())
        number.is_number = True
        return number
    raise Untraceable(f"it computes with {type(value).__name__}")


def symbols(*values: Any) -> list[Symbol]:
    """Arguments of one operation, of which at least one is a symbol."""
    like = next(value for value in values if isinstance(value, Symbol))
    return [symbol(value, like) for value in values]


def broadcast(*given: Symbol) -> Axes:
    """The axes of an elementwise operation's result."""
    count = max(len(each.axes) for each in given)
    axes: list[Any] = [1] * count
    for each in given:
        for i, axis in enumerate(each.axes, count - len(each.axes)):
            if axis == 1 or axes[i] == axis:
                continue
            if axes[i] != 1:
                raise Untraceable(f"it combines shapes {[[*e.axes] for e in given]}")
            axes[i] = axis
    return checked(tuple(axes))


def checked(axes: Axes) -> Axes:
    """Axes of examples, then columns: **raises** for any other."""
    wide = [axis for axis in axes if axis != 1]
    if wide.count(EXAMPLES) > 1 or len(wide) > 2 or (len(wide) == 2 and wide[0] != EXAMPLES):
        raise Untraceable(f"it computes a tensor of shape {[*axes]}")
    return axes


def width(axes: Axes) -> int:
    """The number of columns."""
    return next((axis for axis in axes if axis not in (1, EXAMPLES)), 1)


def elementwise(name: str, *values: Any) -> Symbol:
    """The result of an operation of the table; of means, where it is linear in them."""
    given = symbols(*values)
    axes = broadcast(*given)
    if any(each.is_mean for each in given):
        _check_linear(name, given)
    expression = operate(name, *(each.expression for each in given))
    result = given[0].like(expression, axes, any(each.is_mean for each in given))
    result.is_number = all(each.is_number for each in given)
    return result


def _check_linear(name: str, given: list[Symbol]) -> None:
    """**Raises** where the mean of an operation is not the operation of the means."""
    means = [each.is_mean for each in given]
    plain = [each.expression for each in given if not each.is_mean]
    shared = not any(each.of_examples for each in plain)
    linear = name in ("add", "subtract", "negate") or (
        (name == "multiply" and sum(means) == 1) or (name == "divide" and means == [True, False])
    )
    if not linear or not shared:
        raise Untraceable(f"it computes {name} of a mean over examples")
