"""Sinusoid tasks: their distribution, shapes and seeds."""

import math

import pytest
import torch

from fastmeta.data import Sinusoid

TASKS = 4000


def test_shapes_and_dtype():
    (sx, sy), (qx, qy) = Sinusoid(shots=3, queries=7, seed=0, dtype=torch.float64).sample(5)
    assert sx.shape == sy.shape == (5, 3, 1)
    assert qx.shape == qy.shape == (5, 7, 1)
    assert {t.dtype for t in (sx, sy, qx, qy)} == {torch.float64}
    assert all(t.is_contiguous() for t in (sx, sy, qx, qy))


def test_examples_lie_on_the_curves_that_were_drawn():
    source = Sinusoid(seed=0, dtype=torch.float64)
    curves = source.draw(6)
    for x, y in source.sample(curves):
        for task in range(6):
            expected = curves.amplitude[task] * torch.sin(x[task] - curves.phase[task])
            assert torch.equal(y[task], expected)
        assert torch.equal(curves(x), y)
    shared = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None]
    assert curves(shared).shape == (6, 11, 1)


def test_ranges_are_filled_evenly():
    source = Sinusoid(seed=0)
    curves = source.draw(TASKS)
    x = source.sample(curves)[0][0]
    for values, low, high in (
        (curves.amplitude, 0.1, 5.0),
        (curves.phase, 0.0, math.pi),
        (x.flatten(), -5.0, 5.0),
    ):
        assert values.min() >= low
        assert values.max() <= high
        counts = torch.histc(values, bins=8, min=low, max=high)
        expected = len(values) / 8
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_support_and_query_are_different_points():
    (sx, _), (qx, _) = Sinusoid(seed=0).sample(100)
    assert not (sx == qx.transpose(1, 2)).any()


def test_seed_repeats_and_batches_go_on():
    first, second = Sinusoid(seed=3), Sinusoid(seed=3)
    a, b = first.sample(4), first.sample(4)
    assert torch.equal(a[0][0], second.sample(4)[0][0])
    assert torch.equal(b[1][1], second.sample(4)[1][1])
    assert not torch.equal(a[0][0], b[0][0])
    assert not torch.equal(a[0][0], Sinusoid(seed=4).sample(4)[0][0])
    assert not torch.equal(Sinusoid().sample(4)[0][0], Sinusoid().sample(4)[0][0])


@pytest.mark.usefixtures("global_generator_untouched")
def test_global_generator_is_left_alone():
    Sinusoid(seed=0).sample(4)
    Sinusoid().sample(4)


@pytest.mark.parametrize("argument", ["shots", "queries"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_bad_counts_are_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}: {value}; it must be a whole number"):
        Sinusoid(**{argument: value})


def test_bad_number_of_tasks_is_refused():
    with pytest.raises(ValueError, match=r"^tasks: 0; it must be a whole number from 1 up"):
        Sinusoid().sample(0)
