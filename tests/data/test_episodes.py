"""Episodes: what is in a task, that nothing is in it twice, and that all is equally likely."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmeta.data import Episodes, rotated_classes
from fastmeta.data.drawing import draw_without_replacement


def numbered(classes: int, examples: int) -> torch.Tensor:
    """Examples that say which they are: [C, E, 2] holding class and example, as int64."""
    c, e = torch.meshgrid(torch.arange(classes), torch.arange(examples), indexing="ij")
    return torch.stack([c, e], -1)


def check_episode(source: Episodes, tasks: int, class_of) -> None:
    """Hold one batch against everything that is promised of it."""
    ways, shots, queries = source.ways, source.shots, source.queries
    (sx, sy), (qx, qy) = source.sample(tasks)
    assert sx.shape == (tasks, ways * shots, 2)
    assert qx.shape == (tasks, ways * queries, 2)
    assert sy.shape == (tasks, ways * shots)
    assert qy.shape == (tasks, ways * queries)
    assert sy.dtype == qy.dtype == torch.int64
    for task in range(tasks):
        x = torch.cat([sx[task], qx[task]])
        y = torch.cat([sy[task], qy[task]])
        seen = [tuple(row) for row in x.tolist()]
        assert len(set(seen)) == len(seen), "an example occurs twice"
        classes = [class_of(row) for row in seen]
        pairs = set(zip(classes, y.tolist(), strict=True))
        assert len(pairs) == ways, "a label stands for two classes, or a class has two labels"
        assert {label for _, label in pairs} == set(range(ways))
        assert (sy[task].bincount(minlength=ways) == shots).all()
        assert (qy[task].bincount(minlength=ways) == queries).all()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_every_task_is_well_formed(data):
    classes = data.draw(st.integers(1, 9), label="classes")
    examples = data.draw(st.integers(2, 8), label="examples")
    ways = data.draw(st.integers(1, classes), label="ways")
    shots = data.draw(st.integers(1, examples - 1), label="shots")
    queries = data.draw(st.integers(1, examples - shots), label="queries")
    tasks = data.draw(st.integers(1, 5), label="tasks")
    source = Episodes(numbered(classes, examples), ways, shots, queries, seed=0)
    check_episode(source, tasks, class_of=lambda row: row[0])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(3, 7), min_size=3, max_size=6), st.integers(0, 1000))
def test_classes_of_unequal_size(sizes, seed):
    labels = torch.cat([torch.full((size,), 10 * c - 10) for c, size in enumerate(sizes)])
    x = torch.stack([labels, torch.arange(len(labels))], -1)
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    source = Episodes.from_labels(x[mixed], labels[mixed], ways=3, shots=1, queries=2, seed=seed)
    check_episode(source, 4, class_of=lambda row: row[0])


def test_every_class_order_and_example_is_equally_likely():
    tasks = 20_000
    (sx, _), (qx, _) = Episodes(numbered(6, 4), ways=2, shots=1, queries=2, seed=0).sample(tasks)
    for way in range(2):  # the class that a label stands for, and the examples in either set
        counts = sx[:, way, 0].bincount(minlength=6)
        assert_even(counts, tasks / 6)
        assert_even(sx[:, way, 1].bincount(minlength=4), tasks / 4)
        assert_even(qx[:, 2 * way, 1].bincount(minlength=4), tasks / 4)
    pairs = 6 * sx[:, 0, 0] + sx[:, 1, 0]  # ordered pairs of different classes: 30 of 36
    counts = pairs.bincount(minlength=36).view(6, 6)
    assert_even(counts[~torch.eye(6, dtype=torch.bool)], tasks / 30)


def assert_even(counts: torch.Tensor, expected: float) -> None:
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_draws_serve_rows_of_different_populations():
    populations = torch.tensor([3, 3, 50, 4000]).repeat(500)
    drawn = draw_without_replacement(populations, 3, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 3)
    assert (drawn >= 0).all()
    assert (drawn < populations[:, None]).all()
    ordered = drawn.sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert drawn[2::4].max() > 45


def test_the_example_beneath_is_the_one_that_was_stored():
    images = torch.rand(7, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    (sx, _), (qx, _) = Episodes(images, ways=3, shots=2, queries=1, seed=0).sample(4)
    assert sx.shape == (4, 6, 3, 4, 4)
    stored = {tuple(image.flatten().tolist()) for image in images.flatten(0, 1)}
    assert {tuple(x.flatten().tolist()) for x in sx.flatten(0, 1)} <= stored
    assert {tuple(x.flatten().tolist()) for x in qx.flatten(0, 1)} <= stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bytes_become_numbers_up_to_one(dtype):
    images = torch.full((2, 2, 3), 255, dtype=torch.uint8)
    (x, _), _ = Episodes(images, ways=1, shots=1, queries=1, dtype=dtype).sample(1)
    assert x.dtype == dtype
    assert torch.allclose(x, torch.ones_like(x))
    (x, _), _ = Episodes(images, ways=1, shots=1, queries=1, dtype=dtype, scale=1.0).sample(1)
    assert (x == 255).all()


def test_floats_are_not_scaled_unless_asked_and_never_changed_in_place():
    images = torch.full((2, 2, 3), 0.5)
    (x, _), _ = Episodes(images, ways=1, shots=1, queries=1).sample(1)
    assert (x == 0.5).all()
    (x, _), _ = Episodes(images, ways=1, shots=1, queries=1, scale=4.0).sample(1)
    assert (x == 2).all()
    assert (images == 0.5).all()


def test_token_ids_stay_integers():
    (x, _), _ = Episodes(numbered(3, 3), ways=2, shots=1, queries=1).sample(1)
    assert x.dtype == torch.int64
    with pytest.raises(ValueError, match=r"^scale: 0.5, but torch.int64 examples are handed out"):
        Episodes(numbered(3, 3), ways=2, shots=1, queries=1, scale=0.5)


def test_rotated_classes():
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    turned = rotated_classes(images)
    assert turned.shape == (8, 3, 4, 4)
    for turn in range(4):
        for c in range(2):
            assert torch.equal(turned[2 * turn + c], torch.rot90(images[c], turn, (1, 2)))
    with pytest.raises(ValueError, match=r"^images: shape \[2, 3, 4, 5\]; to be turned"):
        rotated_classes(torch.zeros(2, 3, 4, 5))


def test_rotations_turn_whole_classes_and_keep_characters_apart():
    corners = torch.tensor([[0, 1], [3, 2]])  # which corner is 0 tells the turn
    images = (10 * torch.arange(6).view(6, 1, 1, 1) + corners).expand(6, 4, 2, 2).contiguous()
    source = Episodes(images, ways=5, shots=2, queries=1, seed=0, rotations=True)
    (sx, sy), (qx, qy) = source.sample(200)
    x, y = torch.cat([sx, qx], 1), torch.cat([sy, qy], 1)
    character = x.flatten(2).min(2).values // 10  # [T, N + Q]
    turn = (x.flatten(2) % 10).argmin(2)
    for way in range(5):
        mine = y == way
        assert (character[mine].view(200, 3).diff() == 0).all()
        assert (turn[mine].view(200, 3).diff() == 0).all()
    distinct = character[:, :10:2].sort(1).values
    assert (distinct.diff() > 0).all(), "a character occurs twice, turned"
    assert_even(turn[:, :10:2].flatten().bincount(minlength=4), 250)


def test_seed_repeats_and_batches_go_on():
    images = numbered(20, 5)
    first = Episodes(images, 3, 1, 1, seed=5)
    second = Episodes(images, 3, 1, 1, seed=5)
    a, b = first.sample(4), first.sample(4)
    assert torch.equal(a[0][0], second.sample(4)[0][0])
    assert torch.equal(b[1][0], second.sample(4)[1][0])
    assert not torch.equal(a[0][0], b[0][0])
    assert not torch.equal(a[0][0], Episodes(images, 3, 1, 1, seed=6).sample(4)[0][0])


@pytest.mark.usefixtures("global_generator_untouched")
def test_global_generator_is_left_alone():
    images = torch.zeros(6, 4, 2, 2)
    Episodes(images, 3, 1, 1, seed=0, rotations=True).sample(4)
    Episodes(images, 3, 1, 1).sample(4)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"ways": 7}, "ways: 7, but there are only 6 classes"),
        ({"ways": 0}, "ways: 0; it must be a whole number"),
        ({"shots": 3}, r"shots \+ queries: 3 \+ 2 = 5, but class 0 has only 4 examples"),
        ({"queries": -1}, "queries: -1; it must be a whole number"),
        ({"images": torch.zeros(6)}, r"images: shape \[6\]; it must be \[classes, examples"),
        ({"dtype": torch.int32}, "dtype: torch.int32; it must be a floating-point type"),
    ],
)
def test_bad_arguments_are_refused_by_name(changed, complaint):
    good = {"images": torch.zeros(6, 4, 2), "ways": 5, "shots": 2, "queries": 2}
    Episodes(**good)
    with pytest.raises(ValueError, match=f"^{complaint}"):
        Episodes(**{**good, **changed})


@pytest.mark.parametrize(
    ("y", "complaint"),
    [
        (torch.zeros(5, dtype=torch.int64), r"y: 5 labels, but x has shape \[6, 2\]"),
        (torch.zeros(6), r"y: torch.float32 of shape \[6\]; it must be integers"),
        (torch.zeros(6, 1, dtype=torch.int64), r"y: torch.int64 of shape \[6, 1\]"),
        (
            torch.tensor([4, 4, 4, 9, 4, 9]),
            r"shots \+ queries: 1 \+ 2 = 3, but class 9 has only 2 examples",
        ),
    ],
)
def test_bad_labels_are_refused(y, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        Episodes.from_labels(torch.zeros(6, 2), y, ways=2, shots=1, queries=2)
