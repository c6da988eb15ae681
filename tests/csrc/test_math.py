"""csrc/cpu/math.h, gamma.h on every instruction set, by long double: errors, special values."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import compiling
import mpmath
import numpy as np
import pytest
import torch

extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")

BYTES = {"baseline": 16, "avx2": 32, "avx512": 64}
DTYPES = {"float32": np.float32, "float64": np.float64}
EXACT = np.longdouble

pytestmark = [
    pytest.mark.skipif(compiling.COMPILER is None, reason="there is no C++ compiler here"),
    pytest.mark.skipif(
        np.finfo(EXACT).nmant < 60, reason="long double is hardly longer than double here"
    ),
]


@dataclass(frozen=True)
class Function:
    """The bound that math.h states, where it holds, and what becomes of special values.

    A zero stands for both zeros.
    """

    ulp: float
    special: dict[float, float]
    domain: dict[str, tuple[Any, Any]] | None = None
    absolute: bool = False
    """The bound is in ulp of 1."""


INF, NAN = float("inf"), float("nan")
NORMAL = {name: (np.finfo(name).tiny, np.finfo(name).max) for name in DTYPES}
UNIT = {"float32": (0, 1), "float64": (0, 1)}
# Past these 2^n, the scale of expm1's result, is no number any more.
SCALED = {"float32": (-INF, 88.37), "float64": (-INF, 709.43)}
FUNCTIONS = {
    "exp": Function(1.25, {0: 1, INF: INF, -INF: 0, NAN: NAN}),
    "expm1": Function(2.25, {0: 0, -INF: -1, NAN: NAN}, SCALED),
    "log": Function(1, {1: 0, NAN: NAN}, NORMAL),
    "log1p": Function(1.5, {0: 0, NAN: NAN}, UNIT),
    "tanh": Function(3, {0: 0, INF: 1, -INF: -1, NAN: NAN}),
    "sigmoid": Function(3.25, {0: 0.5, INF: 1, -INF: 0, NAN: NAN}),
    "softplus": Function(2.5, {INF: INF, -INF: 0, NAN: NAN}),
    "tanh_of_softplus": Function(5, {INF: 1, -INF: 0, NAN: NAN}),
    "sigmoid_beside": Function(4, {0: 0.5, INF: 1, -INF: 0, NAN: NAN}),
    "sin": Function(1.6, {0: 0, INF: NAN, -INF: NAN, NAN: NAN}),
    "cos": Function(1.6, {0: 1, INF: NAN, -INF: NAN, NAN: NAN}),
    "erf": Function(2, {0: 0, INF: 1, -INF: -1, NAN: NAN}, absolute=True),
}
SINES = ("sin", "cos", "sine_of_both", "cosine_of_both")
VECTORS = [s for s in extension.instruction_sets() if s in BYTES]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Callable[[str], ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("math")

    @functools.cache
    def driver(name: str) -> ctypes.CDLL:
        flags = [
            *compiling.unit_flags("INSTRUCTION_SETS").get(f"lanes_{name}", []),
            f"-DFASTMETA_NAMESPACE={name}",
            *([f"-DFASTMETA_BYTES={BYTES[name]}"] if name in BYTES else []),
        ]
        source, result = compiling.DRIVERS / "lanes_math.cpp", folder / f"{name}.so"
        return ctypes.CDLL(str(compiling.shared_library(source, result, *flags)))

    return driver


@pytest.fixture(params=VECTORS)
def library(request, compiled) -> ctypes.CDLL:
    return compiled(request.param)


@pytest.fixture(params=[*VECTORS, "plain"])
def sines(request, compiled) -> ctypes.CDLL:
    """A library that has `SINES`: of vectors, or of the scalars of the plain engine."""
    return compiled(request.param)


def call(library: ctypes.CDLL, name: str, x: np.ndarray, result: Any) -> np.ndarray:
    x, out = np.ascontiguousarray(x), np.full(x.shape, NAN, result)
    suffix = "exact" if result == EXACT else np.dtype(result).name
    getattr(library, f"{name}_{suffix}")(
        ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(x.size)
    )
    return out


# Where exp over- and underflows, where a function changes its form, the steps of the reduction.
_BORDERS = (
    88.37, 88.72284, 88.8, 87.33655, 103.97, 104, 709.43, 709.7827, 709.8, 708.4, 745.13, 746,
    0.5, 1, 2, 6, 10, 20, 40, *(np.log(2) / 2 * np.arange(1, 2200)),
)  # fmt: skip


def arguments(dtype: Any, count: int = 200_000) -> np.ndarray:
    """Of every size and sign: by their bits, by their logarithm, evenly, and at the borders."""
    draw = np.random.default_rng(0)
    info, bits = np.finfo(dtype), np.dtype(f"u{np.dtype(dtype).itemsize}")
    parts = [draw.integers(0, np.iinfo(bits).max, count, dtype=bits, endpoint=True).view(dtype)]
    for exponents in ((info.minexp, info.maxexp), (-60, 12), (-6, 6)):
        parts.append(np.exp2(draw.uniform(*exponents, count)).astype(dtype))
    for border in (1, 2, 6, 10, 20, 40, 88, 89, 104, 710, 746):
        parts.append(draw.uniform(-border, border, count // 4).astype(dtype))
    borders = np.array(
        [0, info.smallest_subnormal, info.tiny, info.eps, info.max, *_BORDERS], dtype
    )
    with np.errstate(over="ignore"):
        near = [borders, np.nextafter(borders, dtype(INF)), np.nextafter(borders, dtype(-INF))]
    x = np.concatenate([*parts, *near, *(-part for part in near)])
    return x[np.isfinite(x)]


# The largest arguments of the reduction without the C library.
_REDUCED = {"float32": 1e5, "float64": 1e6}


def angles(dtype: Any, count: int = 200_000) -> np.ndarray:
    """On grids and drawn; past the reduction; by multiples of pi/2, where it cancels digits."""
    draw = np.random.default_rng(1)
    limit = _REDUCED[np.dtype(dtype).name]
    parts = [np.linspace(0, end, count) for end in (4, 100, 3e4)]
    parts += [draw.uniform(0, end, count) for end in (1e4, 1e5, 2 * limit)]
    parts = [part.astype(dtype) for part in parts]
    turns = [np.arange(1, 20_000), draw.integers(1, int(0.7 * limit), count // 2)]
    near = np.array([*(np.concatenate(turns) * (np.pi / 2)), limit, 1e6, 1e10, 1e30], dtype)
    parts += [near, np.nextafter(near, dtype(INF)), np.nextafter(near, dtype(-INF))]
    x = np.concatenate(parts)
    return x * draw.choice(np.array([-1, 1], dtype), x.size)


def errors_in_ulp(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|got - exact| in units of got's last place at `exact`; infinity is the first power past all.

    A number that should have none, or has none, is infinitely wrong.
    """
    info = np.finfo(got.dtype)
    past = np.ldexp(EXACT(1), info.maxexp)
    wide = np.clip(got.astype(EXACT), -past, past)
    exact = np.clip(exact, -past, past)
    _, exponent = np.frexp(exact)
    exponent = np.clip(exponent, info.minexp + 1, info.maxexp)
    error = np.abs(wide - exact) / np.ldexp(EXACT(1), exponent - info.nmant - 1)
    return np.where(np.isnan(error), INF, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_keep_to_the_bounds_that_math_h_states(name, dtype, library) -> None:
    function = FUNCTIONS[name]
    x = arguments(DTYPES[dtype])
    if function.domain is not None:
        low, high = function.domain[dtype]
        x = x[(x >= low) & (x <= high)]
    got = call(library, name, x, DTYPES[dtype])
    exact = call(library, name, x.astype(np.float64), EXACT)
    if function.absolute:
        error = np.abs(got.astype(EXACT) - exact) / np.finfo(dtype).eps
    else:
        error = errors_in_ulp(got, exact)
    worst = int(np.argmax(error))
    assert error[worst] <= function.ulp, f"{name}({x[worst]!r}) = {got[worst]!r}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SINES)
def test_sines_of_large_angles_and_next_to_multiples_of_a_quarter_turn(name, dtype, sines) -> None:
    x = angles(DTYPES[dtype])
    got = call(sines, name, x, DTYPES[dtype])
    error = errors_in_ulp(got, call(sines, name, x.astype(np.float64), EXACT))
    worst = int(np.argmax(error))
    assert error[worst] <= FUNCTIONS["sin"].ulp, f"{name}({x[worst]!r}) = {got[worst]!r}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SINES)
def test_sines_of_zeros_denormals_and_what_has_no_sine(name, dtype, sines) -> None:
    small = np.finfo(dtype).smallest_subnormal
    tiny = np.array([0.0, -0.0, small, -small, 37 * small, 1e-30], DTYPES[dtype])
    got = call(sines, name, tiny, DTYPES[dtype])
    expected = tiny if name in ("sin", "sine_of_both") else np.ones_like(tiny)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))
    assert np.isnan(call(sines, name, np.array([NAN, INF, -INF], dtype), DTYPES[dtype])).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name, dtype, library) -> None:
    special = FUNCTIONS[name].special
    expected = np.array(list(special.values()), DTYPES[dtype])
    x = np.array(list(special), DTYPES[dtype])
    for both in (x, np.where(x == 0, -x, x)):
        np.testing.assert_array_equal(call(library, name, both, DTYPES[dtype]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_denormal_is_not_flushed(dtype, library) -> None:
    small = np.finfo(dtype).smallest_subnormal
    x = np.array([small, -small, 37 * small], DTYPES[dtype])
    for name in ("expm1", "tanh"):
        np.testing.assert_array_equal(call(library, name, x, DTYPES[dtype]), x)
    below = {"float32": -100.0, "float64": -740.0}[dtype]
    tail = np.array([below], DTYPES[dtype])
    for name in ("exp", "sigmoid", "softplus"):
        assert 0 < call(library, name, tail, DTYPES[dtype])[0] < np.finfo(dtype).tiny


def test_one_lane_does_not_disturb_another(library) -> None:
    for dtype in DTYPES.values():
        x = np.array([1.5, NAN, INF, -INF, 0.25, -3.0, 1e-30, -0.0, 1e30] * 4, dtype)
        for name in FUNCTIONS:
            together = call(library, name, x, dtype)
            alone = np.array([call(library, name, x[i : i + 1], dtype)[0] for i in range(x.size)])
            np.testing.assert_array_equal(together, alone)


GAMMA = {
    "log_gamma": mpmath.loggamma,
    "digamma": mpmath.digamma,
    "trigamma": lambda x: mpmath.psi(1, x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GAMMA)
def test_the_gamma_function_and_its_derivatives(name, dtype, sines) -> None:
    """Errors in eps of `1 + |exact|`; four times that below 0, where large terms cancel."""
    draw = np.random.default_rng(2)
    parts = [np.exp2(draw.uniform(-40, 60, 300)), draw.uniform(0, 12, 300), np.arange(1, 30)]
    parts += [-draw.integers(0, 20, 300) - draw.uniform(0.05, 0.95, 300)]
    x = np.concatenate(parts).astype(dtype)
    got = call(sines, name, x, DTYPES[dtype]).astype(np.float64)
    exact = np.array([float(mpmath.re(GAMMA[name](mpmath.mpf(float(each))))) for each in x])
    error = np.abs(got - exact) / (1 + np.abs(exact)) / np.finfo(dtype).eps
    error = np.where(x > 0, error, error / 4)  # where large terms cancel
    assert error.max() <= 24, f"{name}({x[error.argmax()]!r}) = {got[error.argmax()]!r}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gamma_function_at_poles_and_past_all_numbers(dtype, sines) -> None:
    x = np.array([0.0, -0.0, -1.0, -7.0, INF, NAN, np.finfo(dtype).max], dtype)
    found = {name: call(sines, name, x, DTYPES[dtype]) for name in GAMMA}
    for name, by_torch in {"log_gamma": torch.lgamma, "digamma": torch.digamma}.items():
        np.testing.assert_allclose(found[name], by_torch(torch.from_numpy(x)).numpy(), rtol=1e-5)
    assert np.isinf(found["trigamma"][:4]).all()
    assert found["trigamma"][4] == 0
    assert np.isnan(found["trigamma"][5])
