"""What torch's functions and methods give of symbols, by name.

Functions that are compositions stand here as such; what torch has under another name is an alias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastmeta.network.expressions.expression import (
    INPUT,
    Expression,
    constant,
    held,
    operate,
    reduce,
    variable,
)
from fastmeta.network.expressions.tracing import (
    EXAMPLES,
    Axes,
    Symbol,
    Untraceable,
    checked,
    elementwise,
    symbol,
    symbols,
)

COUNT = ("count",)
"""The key of the number of examples."""


def index_key(columns: int) -> tuple[str, int]:
    """The key of the numbers 0 .. columns - 1."""
    return "index", columns


_same = lambda x, *args, **kwargs: x  # noqa: E731

ANSWERS: dict[str, Callable[..., Any]] = {}


def _answers(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names or (function.__name__.strip("_"),):
            ANSWERS[name] = function
        return function

    return register


def _of_table(operation: str, arguments: int) -> Callable[..., Any]:
    if arguments == 1:

        def unary(input: Any) -> Symbol:
            return elementwise(operation, input)

        return unary

    def binary(input: Any, other: Any) -> Symbol:
        return elementwise(operation, input, other)

    return binary


for _operation, _names in {
    "exp": ("exp",), "expm1": ("expm1",), "log": ("log",), "log1p": ("log1p",), "tanh": ("tanh",),
    "sigmoid": ("sigmoid", "expit"), "sine": ("sin",), "cosine": ("cos",), "sqrt": ("sqrt",),
    "absolute": ("abs", "absolute"), "sign": ("sign", "sgn"), "erf": ("erf",),
    "negate": ("neg", "negative"),
}.items():  # fmt: skip
    for _name in _names:
        ANSWERS[_name] = _of_table(_operation, 1)
for _operation, _names in {
    "multiply": ("mul", "multiply"), "power": ("pow",), "maximum": ("maximum",),
    "minimum": ("minimum",), "less": ("lt", "less"), "less_equal": ("le", "less_equal"),
    "equal": ("eq",),
}.items():  # fmt: skip
    for _name in _names:
        ANSWERS[_name] = _of_table(_operation, 2)
for _name in ("contiguous", "clone", "float", "double", "type_as", "to", "pos", "positive"):
    ANSWERS[_name] = _same


@_answers("add")
def _add(input: Any, other: Any, *, alpha: float = 1) -> Symbol:
    return elementwise("add", input, other if alpha == 1 else elementwise("multiply", alpha, other))


@_answers("sub", "subtract")
def _sub(input: Any, other: Any, *, alpha: float = 1) -> Symbol:
    other = other if alpha == 1 else elementwise("multiply", alpha, other)
    return elementwise("subtract", input, other)


@_answers("div", "divide", "true_divide")
def _div(input: Any, other: Any) -> Symbol:
    return elementwise("divide", input, other)


@_answers("gt", "greater")
def _gt(input: Any, other: Any) -> Symbol:
    return elementwise("less", other, input)


@_answers("ge", "greater_equal")
def _ge(input: Any, other: Any) -> Symbol:
    return elementwise("less_equal", other, input)


@_answers("ne", "not_equal")
def _ne(input: Any, other: Any) -> Symbol:
    return 1 - elementwise("equal", input, other)


@_answers("and", "bitwise_and", "logical_and")
def _and(input: Any, other: Any) -> Symbol:
    return elementwise("multiply", _true(input), _true(other))


@_answers("or", "bitwise_or", "logical_or")
def _or(input: Any, other: Any) -> Symbol:
    return elementwise("maximum", _true(input), _true(other))


@_answers("invert", "bitwise_not", "logical_not")
def _invert(input: Any) -> Symbol:
    return 1 - _true(input)


def _true(condition: Any) -> Any:
    return _ne(condition, 0)


@_answers("square")
def _square(input: Any) -> Symbol:
    return elementwise("power", input, 2)


@_answers("reciprocal")
def _reciprocal(input: Any) -> Symbol:
    return elementwise("divide", 1.0, input)


@_answers("rsqrt")
def _rsqrt(input: Any) -> Symbol:
    return _reciprocal(elementwise("sqrt", input))


@_answers("sinh")
def _sinh(input: Any) -> Symbol:
    return 0.5 * (elementwise("exp", input) - elementwise("exp", -input))


@_answers("cosh")
def _cosh(input: Any) -> Symbol:
    return 0.5 * (elementwise("exp", input) + elementwise("exp", -input))


@_answers("detach")
def _detach(input: Symbol) -> Symbol:
    return input.like(held(input.expression), input.axes, input.is_mean)


@_answers("min")
def _min(input: Any, other: Any) -> Symbol:
    return elementwise("minimum", input, other)


@_answers("max")
def _max(input: Any, other: Any) -> Symbol:
    return elementwise("maximum", input, other)


@_answers("where")
def _where(condition: Any, input: Any, other: Any) -> Symbol:
    return elementwise("select", condition, input, other)


@_answers("masked_fill")
def _masked_fill(input: Any, mask: Any, value: Any) -> Symbol:
    return _where(mask, value, input)


@_answers("clamp", "clip")
def _clamp(input: Any, min: Any = None, max: Any = None) -> Symbol:
    # Not by maximum and minimum: at a bound torch's gradient is all the input's.
    if min is not None:
        input = (
            _where(_ge(input, min), input, min)
            if _is_number(min)
            else elementwise("maximum", input, min)
        )
    if max is not None:
        input = (
            _where(elementwise("less_equal", input, max), input, max)
            if _is_number(max)
            else elementwise("minimum", input, max)
        )
    return input


def _is_number(value: Any) -> bool:
    return not isinstance(value, Symbol) or value.expression.name == "constant"


@_answers("clamp_min")
def _clamp_min(input: Any, min: Any) -> Symbol:
    return _clamp(input, min)


@_answers("clamp_max")
def _clamp_max(input: Any, max: Any) -> Symbol:
    return _clamp(input, None, max)


# Activations, by torch's formulas.


@_answers("relu")
def _relu(input: Any, inplace: bool = False) -> Symbol:
    return _where(elementwise("less_equal", input, 0.0), 0.0, input)  # of NaN it is NaN


@_answers("leaky_relu")
def _leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Symbol:
    return _where(_gt(input, 0.0), input, input * negative_slope)


def _negative(input: Any) -> Symbol:
    """The input up to 0, so that no exponential of it is too large."""
    return _where(_gt(input, 0.0), 0.0, input)


@_answers("elu")
def _elu(input: Any, alpha: Any = 1.0, inplace: bool = False) -> Symbol:
    negative = alpha * elementwise("expm1", _negative(input))
    return _where(_gt(input, 0.0), input, negative)


@_answers("celu")
def _celu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Symbol:
    negative = alpha * elementwise("expm1", _negative(input) / alpha)
    return _where(_gt(input, 0.0), input, negative)


@_answers("selu")
def _selu(input: Any, inplace: bool = False) -> Symbol:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return scale * _elu(input, alpha)


@_answers("softplus")
def _softplus(input: Any, beta: Any = 1.0, threshold: float = 20.0) -> Symbol:
    t = input * beta
    return _where(_gt(t, threshold), input, elementwise("softplus", t) / beta)


@_answers("silu")
def _silu(input: Any, inplace: bool = False) -> Symbol:
    return input * elementwise("sigmoid", input)


@_answers("mish")
def _mish(input: Any, inplace: bool = False) -> Symbol:
    return input * elementwise("tanh", elementwise("softplus", input))


@_answers("gelu")
def _gelu(input: Any, approximate: str = "none") -> Symbol:
    if approximate == "none":
        return input * (0.5 * (1.0 + elementwise("erf", input * math.sqrt(0.5))))
    inner = math.sqrt(2 / math.pi) * (input + 0.044715 * (input * input * input))
    return 0.5 * input * (1.0 + elementwise("tanh", inner))


@_answers("logsigmoid", "log_sigmoid")
def _logsigmoid(input: Any) -> Symbol:
    return -elementwise("softplus", -input)


@_answers("hardtanh")
def _hardtanh(
    input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Symbol:
    # Unlike clamp's, its slope at a bound is 0.
    inside = _and(_gt(input, min_val), elementwise("less", input, max_val))
    return _where(inside, input, held_clamp(input, min_val, max_val))


def held_clamp(input: Symbol, low: float, high: float) -> Symbol:
    """A clamped value without a derivative."""
    return _detach(_clamp(input, low, high))


@_answers("relu6")
def _relu6(input: Any, inplace: bool = False) -> Symbol:
    return _hardtanh(input, 0.0, 6.0)


@_answers("hardsigmoid")
def _hardsigmoid(input: Any, inplace: bool = False) -> Symbol:
    return _hardtanh(input + 3.0, 0.0, 6.0) / 6.0


@_answers("hardswish")
def _hardswish(input: Any, inplace: bool = False) -> Symbol:
    # As torch's backward has it: 0 up to -3, and 1 from 3 on.
    bent = _where(elementwise("less", input, 3.0), input * (input + 3.0) / 6.0, input)
    return _where(elementwise("less_equal", input, -3.0), 0.0, bent)


@_answers("softsign")
def _softsign(input: Any) -> Symbol:
    return input / (1.0 + elementwise("absolute", input))


@_answers("tanhshrink")
def _tanhshrink(input: Any) -> Symbol:
    return input - elementwise("tanh", input)


ELEMENTWISE = frozenset(ANSWERS) - {"float", "double", "type_as", "to"} | {"module"}
"""The names of what computes number by number; casts change the numbers' type."""


# Shapes.


@_answers("size")
def _size(input: Symbol, dim: int | None = None) -> Any:
    return input.shape if dim is None else input.shape[dim]


@_answers("dim")
def _dim(input: Symbol) -> int:
    return input.ndim


@_answers("numel")
def _numel(input: Symbol) -> int:
    return input.shape.numel()


@_answers("squeeze")
def _squeeze(input: Symbol, dim: int | None = None) -> Symbol:
    places = range(input.ndim) if dim is None else [dim % input.ndim]
    axes = tuple(a for i, a in enumerate(input.axes) if i not in places or a != 1)
    return input.like(input.expression, axes, input.is_mean)


@_answers("unsqueeze")
def _unsqueeze(input: Symbol, dim: int) -> Symbol:
    place = dim % (input.ndim + 1)
    axes = (*input.axes[:place], 1, *input.axes[place:])
    return input.like(input.expression, axes, input.is_mean)


@_answers("view", "reshape")
def _reshape(input: Symbol, *shape: Any) -> Symbol:
    sizes = [*(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = input.shape.numel() // max(1, known)
    axes = tuple(EXAMPLES if size == input.examples else size for size in sizes)
    wide = [[a for a in each if a != 1] for each in (axes, input.axes)]
    if wide[0] != wide[1]:
        raise Untraceable(f"it views {[*input.axes]} as {sizes}")
    return input.like(input.expression, checked(axes), input.is_mean)


@_answers("view_as", "reshape_as")
def _reshape_as(input: Symbol, other: Symbol) -> Symbol:
    return _reshape(input, *other.shape)


@_answers("flatten")
def _flatten(input: Symbol, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    start, end = start_dim % input.ndim, end_dim % input.ndim
    sizes = [*input.shape]
    return _reshape(input, [*sizes[:start], math.prod(sizes[start : end + 1]), *sizes[end + 1 :]])


@_answers("expand")
def _expand(input: Symbol, *sizes: Any) -> Symbol:
    shape = [*(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)]
    axes: list[Any] = [1] * (len(shape) - input.ndim) + [*input.axes]
    for i, size in enumerate(shape):
        if size != -1 and axes[i] == 1:
            axes[i] = EXAMPLES if size == input.examples else size
    return input.like(input.expression, checked(tuple(axes)), input.is_mean)


@_answers("expand_as")
def _expand_as(input: Symbol, other: Symbol) -> Symbol:
    return _expand(input, *other.shape)


@_answers("broadcast_tensors")
def _broadcast_tensors(*tensors: Any) -> tuple[Symbol, ...]:
    given = symbols(*tensors)
    total = given[0]
    for each in given[1:]:
        total = elementwise("add", total, each)
    return tuple(_expand(each, *total.shape) for each in given)


@_answers("zeros_like")
def _zeros_like(input: Symbol, **_: Any) -> Symbol:
    return input.like(constant(0.0), input.axes)


@_answers("ones_like")
def _ones_like(input: Symbol, **_: Any) -> Symbol:
    return input.like(constant(1.0), input.axes)


@_answers("full_like")
def _full_like(input: Symbol, fill_value: float, **_: Any) -> Symbol:
    return input.like(constant(fill_value), input.axes)


@_answers("getitem")
def _getitem(input: Symbol, index: Any) -> Symbol:
    parts = [*index] if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        missing = input.ndim - sum(part is not None for part in parts) + 1
        parts[place : place + 1] = [slice(None)] * missing
    given = sum(part is not None for part in parts)
    parts += [slice(None)] * (input.ndim - given)
    axes: list[Any] = []
    old = iter(input.axes)
    expression = input.expression
    for part in parts:
        if part is None:
            axes.append(1)
            continue
        axis = next(old)
        if part == slice(None):
            axes.append(axis)
        elif axis == EXAMPLES:
            raise Untraceable("it picks examples")
        elif type(part) is int:
            expression = _columns(expression, axis, part % axis, 1)
        elif isinstance(part, slice) and part.step in (None, 1):
            first, last, _ = part.indices(axis)
            expression = _columns(expression, axis, first, last - first)
            axes.append(last - first)
        else:
            raise Untraceable("it picks columns by an index that is no number and no slice")
    return input.like(expression, tuple(axes), input.is_mean)


def _columns(expression: Expression, axis: int, first: int, count: int) -> Expression:
    """Some columns of a value of `axis` columns, taken where it comes from."""
    if count < 1 or first < 0 or first + count > axis:
        raise Untraceable("it picks columns that are not there")
    if expression.columns == 1:
        return expression
    if expression.name == INPUT:
        name, *rest = expression.value
        if name == "index":
            return operate("add", variable(index_key(count), False, count), float(first))
        before = rest[-1] if name == "columns" else 0
        key = expression.value[1] if name == "columns" else expression.value
        return variable(("columns", key, before + first), expression.of_examples, count)
    arguments = [_columns(a, axis, first, count) for a in expression.arguments]
    if expression.name == "held":
        return held(arguments[0])
    if expression.name in ("sum_rows", "spread"):
        raise Untraceable("it picks columns of a sum")
    return operate(expression.name, *arguments)


@_answers("select")
def _select(input: Symbol, dim: int, index: int) -> Symbol:
    return _getitem(input, (*[slice(None)] * (dim % input.ndim), index))


@_answers("narrow")
def _narrow(input: Symbol, dim: int, start: int, length: int) -> Symbol:
    return _getitem(input, (*[slice(None)] * (dim % input.ndim), slice(start, start + length)))


@_answers("split")
def _split(tensor: Symbol, split_size_or_sections: Any, dim: int = 0) -> tuple[Symbol, ...]:
    size = tensor.shape[dim]
    each = split_size_or_sections
    sizes = [min(each, size - i) for i in range(0, size, each)] if isinstance(each, int) else each
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(tensor, dim, s, n) for s, n in zip(starts, sizes, strict=True))


@_answers("chunk")
def _chunk(input: Symbol, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
    return _split(input, -(-input.shape[dim] // chunks), dim)


@_answers("unbind")
def _unbind(input: Symbol, dim: int = 0) -> tuple[Symbol, ...]:
    return tuple(_select(input, dim, i) for i in range(input.shape[dim]))


# Reductions.


@_answers("sum")
def _sum(input: Symbol, dim: Any = None, keepdim: bool = False, *, axis: Any = None) -> Symbol:
    return _reduced(input, dim if axis is None else axis, keepdim, of_mean=False)


@_answers("mean")
def _mean(input: Symbol, dim: Any = None, keepdim: bool = False, *, axis: Any = None) -> Symbol:
    return _reduced(input, dim if axis is None else axis, keepdim, of_mean=True)


def _reduced(input: Symbol, dim: Any, keepdim: bool, of_mean: bool) -> Symbol:
    places = _places(input, dim)
    expression, mean = input.expression, input.is_mean
    for place in places:
        axis = input.axes[place]
        if axis == EXAMPLES:
            mean = True
            if not of_mean:
                expression = operate("multiply", expression, variable(COUNT, False))
        elif axis != 1:
            if expression.columns > 1:
                expression = reduce("sum_columns", expression)
            elif not of_mean:
                expression = operate("multiply", expression, float(axis))
            if of_mean and input.expression.columns > 1:
                expression = operate("divide", expression, float(axis))
    return input.like(expression, _without(input.axes, places, keepdim), mean)


def _places(input: Symbol, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return [*range(input.ndim)]
    dims = [dim] if isinstance(dim, int) else [*dim]
    return sorted(d % max(1, input.ndim) for d in dims) if input.ndim else []


def _without(axes: Axes, places: list[int], keepdim: bool) -> Axes:
    if keepdim:
        return tuple(1 if i in places else axis for i, axis in enumerate(axes))
    return tuple(axis for i, axis in enumerate(axes) if i not in places)


def _over_columns(name: str, input: Symbol, dim: Any, keepdim: bool) -> Symbol:
    places = _places(input, dim)
    if input.is_mean or any(input.axes[place] == EXAMPLES for place in places):
        raise Untraceable(f"it takes {name} over examples")
    return input.like(reduce(name, input.expression), _without(input.axes, places, keepdim))


@_answers("amax")
def _amax(input: Symbol, dim: Any = (), keepdim: bool = False) -> Symbol:
    return _over_columns("max_columns", input, dim, keepdim)


@_answers("amin")
def _amin(input: Symbol, dim: Any = (), keepdim: bool = False) -> Symbol:
    return -_amax(-input, dim, keepdim)


def _shift(input: Symbol, dim: Any) -> Symbol:
    """The largest of an example's columns where it is finite, held constant."""
    largest = _over_columns("peak", input, dim, True)
    infinite = elementwise("equal", elementwise("absolute", largest), math.inf)
    return _where(infinite, 0.0, largest)


@_answers("logsumexp")
def _logsumexp(input: Symbol, dim: Any, keepdim: bool = False) -> Symbol:
    shift = _shift(input, dim)
    total = elementwise("log", _sum(elementwise("exp", input - shift), dim, True)) + shift
    return (
        total
        if keepdim
        else total.like(total.expression, _without(input.axes, _places(input, dim), False))
    )


@_answers("log_softmax")
def _log_softmax(input: Symbol, dim: Any = -1, _stacklevel: int = 3, dtype: Any = None) -> Symbol:
    return input - _logsumexp(input, dim, True)


@_answers("softmax")
def _softmax(input: Symbol, dim: Any = -1, _stacklevel: int = 3, dtype: Any = None) -> Symbol:
    powers = elementwise("exp", input - _shift(input, dim))
    return powers / _sum(powers, dim, True)


@_answers("gather")
def _gather(input: Symbol, dim: int, index: Symbol) -> Symbol:
    if dim % input.ndim != 1 or input.ndim != 2 or index.axes != (EXAMPLES, 1):
        raise Untraceable("it gathers what is not one column of each example")
    return _sum(input * _hot(index, input.axes[1]), 1, True)


@_answers("one_hot")
def _one_hot(tensor: Symbol, num_classes: int = -1) -> Symbol:
    if num_classes < 1 or tensor.axes != (EXAMPLES,):
        raise Untraceable("it calls one_hot without num_classes, or not of labels [N]")
    return _hot(_unsqueeze(tensor, 1), num_classes)


def _hot(labels: Symbol, classes: int) -> Symbol:
    numbers = labels.like(variable(index_key(classes), False, classes), (1, classes))
    return elementwise("equal", labels, numbers)


# Losses, by torch's formulas.


def _loss(each: Symbol, reduction: str, **options: Any) -> Symbol:
    """The reduced loss, of options that are at their defaults."""
    for name, value in options.items():
        if value is not None and (name, value) != ("ignore_index", -100):
            raise Untraceable(f"a loss has the option {name}")
    if reduction == "none":
        return each
    if reduction not in ("mean", "sum"):
        raise Untraceable(f"it reduces a loss by {reduction!r}")
    return _mean(each) if reduction == "mean" else _sum(each)


def _by_error(of: Callable[..., Symbol]) -> Callable[..., Symbol]:
    def loss(
        input: Any, target: Any, *, reduction: str = "mean", size_average: Any = None,
        reduce: Any = None, weight: Any = None, **options: Any,
    ) -> Symbol:  # fmt: skip
        each = of(input - target, **options)
        return _loss(each, reduction, size_average=size_average, reduce=reduce, weight=weight)

    return loss


ANSWERS["mse_loss"] = _by_error(lambda error: _square(error))
ANSWERS["l1_loss"] = _by_error(lambda error: elementwise("absolute", error))


def _huber_of(error: Symbol, delta: Any = 1.0) -> Symbol:
    size = elementwise("absolute", error)
    return _where(
        elementwise("less", size, delta), 0.5 * error * error, delta * (size - 0.5 * delta)
    )


ANSWERS["huber_loss"] = _by_error(_huber_of)
ANSWERS["smooth_l1_loss"] = _by_error(lambda error, beta=1.0: _huber_of(error, beta) / beta)


@_answers("binary_cross_entropy_with_logits")
def _bce(
    input: Any, target: Any, weight: Any = None, *, reduction: str = "mean",
    pos_weight: Any = None, **options: Any,
) -> Symbol:  # fmt: skip
    if pos_weight is None:
        each = elementwise("softplus", input) - input * target
    else:
        positive = target * pos_weight
        each = (1.0 - target + positive) * elementwise("softplus", input) - input * positive
    return _loss(each if weight is None else each * weight, reduction, **options)


@_answers("nll_loss")
def _nll_loss(
    input: Symbol, target: Symbol, weight: Any = None, *, reduction: str = "mean", **options: Any
) -> Symbol:
    each = -_sum(input * _hot(_unsqueeze(target, 1), input.axes[1]), 1)
    return _loss(each, reduction, weight=weight, **options)


@_answers("cross_entropy")
def _cross_entropy(
    input: Symbol, target: Symbol, weight: Any = None, *, reduction: str = "mean",
    label_smoothing: float = 0.0, **options: Any,
) -> Symbol:  # fmt: skip
    if input.ndim != 2:
        raise Untraceable("it takes the cross-entropy of what is not [N, C]")
    classes = input.axes[1]
    hot = target if target.ndim == 2 else _hot(_unsqueeze(target, 1), classes)
    if isinstance(label_smoothing, Symbol) or label_smoothing:
        hot = hot * (1 - label_smoothing) + label_smoothing / classes
    mass = _sum(target, 1) if target.ndim == 2 else 1.0
    each = mass * _logsumexp(input, 1) - _sum(input * hot, 1)
    return _loss(each, reduction, weight=weight, **options)


@_answers("kl_div")
def _kl_div(
    input: Any, target: Any, *, reduction: str = "mean", log_target: bool = False, **options: Any
) -> Symbol:
    if log_target:
        each = elementwise("exp", target) * (target - input)
    else:
        entropy = target * elementwise("log", target)
        each = _where(_gt(target, 0.0), entropy, 0.0) - target * input
    if reduction == "batchmean":
        each, reduction = _sum(each, -1), "mean"
    return _loss(each, reduction, **options)


@_answers("gaussian_nll_loss")
def _gaussian_nll_loss(
    input: Any, target: Any, var: Any, full: bool = False, eps: float = 1e-6,
    reduction: str = "mean",
) -> Symbol:  # fmt: skip
    var = symbol(var, next(v for v in (input, target, var) if isinstance(v, Symbol)))
    # torch clamps the variance without a derivative's notice.
    safe = var + _detach(elementwise("maximum", var, eps) - var)
    each = 0.5 * (elementwise("log", safe) + _square(input - target) / safe)
    return _loss(each + (0.5 * math.log(2 * math.pi) if full else 0.0), reduction)


@_answers("poisson_nll_loss")
def _poisson_nll_loss(
    input: Any, target: Any, log_input: bool = True, full: bool = False, size_average: Any = None,
    eps: float = 1e-8, reduce: Any = None, reduction: str = "mean",
) -> Symbol:  # fmt: skip
    if full:
        raise Untraceable("it asks for the full poisson_nll_loss")
    if log_input:
        each = elementwise("exp", input) - target * input
    else:
        each = input - target * elementwise("log", input + eps)
    return _loss(each, reduction)


@_answers("soft_margin_loss")
def _soft_margin_loss(
    input: Any, target: Any, *, reduction: str = "mean", **options: Any
) -> Symbol:
    return _loss(elementwise("softplus", -target * input), reduction, **options)
