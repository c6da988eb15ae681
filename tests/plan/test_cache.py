"""Results about a model: the least recently used go first, and memory is bounded."""

from __future__ import annotations

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta
from fastmeta.plan.cache import Cache
from fastmeta.plan.snapshot import snapshot


def test_those_not_used_for_longest_go_first() -> None:
    cache, made = Cache(most=6 * (4 << 10)), list[str]()

    def find(key: str) -> str:
        return cache.find(key, lambda: made.append(key) or key)

    for key in "abcdaefa":  # the second a outlives the second generation, b and c do not
        assert find(key) == key
    assert made == ["a", "b", "c", "d", "e", "f"]
    for key in "adefgab":
        find(key)
    assert made == ["a", "b", "c", "d", "e", "f", "g", "b"]


def test_tensors_count_by_their_bytes() -> None:
    cache = Cache(most=1 << 20)
    for key in range(8):
        cache.find(key, lambda: torch.zeros(1 << 16))  # 256 KB
        assert 1 <= len(cache) <= 3
    cache.find("large", lambda: torch.zeros(1 << 20))
    cache.find("larger", lambda: torch.zeros(1 << 20))
    assert len(cache) == 2


def test_cycling_over_many_sizes_finds_all_of_them_again() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    tasks = {t: (torch.randn(t, 5, 3), torch.randn(t, 5, 2)) for t in range(1, 60)}
    sizes: list[int] = []
    for _ in range(2):
        for data in tasks.values():
            fastmeta.maml_step(model, data, data, loss_fn=F.mse_loss)
        sizes.append(len(snapshot(model).cache))
    assert sizes[0] == sizes[1] > len(tasks)


def test_what_is_kept_of_a_model_goes_with_it() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(3, 2)
            object.__setattr__(self.child, "parent", self)
            self.child.activation = F.relu

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.child.activation(self.child(x))

    model = Parent()
    data = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    fastmeta.maml_step(model, data, data, loss_fn=F.mse_loss)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_was_found_is_forgotten_where_asked() -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    data = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    for model in models:
        fastmeta.maml_step(model, data, data, loss_fn=F.mse_loss)
    before = [snapshot(model) for model in models]
    fastmeta.clear_cache(models[0])
    assert snapshot(models[0]) is not before[0]
    assert snapshot(models[1]) is before[1]
    fastmeta.clear_cache()
    assert snapshot(models[1]) is not before[1]
