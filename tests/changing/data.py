"""Changes to the shapes of the data, and to a step's options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from changing.kinds import Change, change, put, put_item
from changing.world import World


def _sized(key: str, value: Any) -> Callable[[World], Change]:
    return lambda world: put(world, key, value)


change(name="tasks")(_sized("tasks", 3))
change(name="one task")(_sized("tasks", 1))
change(name="support examples")(_sized("support", 7))
change(name="query examples")(_sized("query", 3))
change(name="tasks of different sizes")(_sized("ragged", True))
change("images", name="pixels")(_sized("side", 14))
change("ByCount", name="support examples, read")(_sized("support", 7))
change(name="input laid out otherwise", matters=False)(_sized("strided", True))
change(name="tasks that are one", matters=True)(_sized("expanded", True))
change("cross_entropy", name="an ignored label")(_sized("ignored", True))
change(name="input in a tuple", matters=False)(_sized("in_a_tuple", True))
change("cross_entropy", name="probabilities as targets")(_sized("probabilities", True))


@change("ByDtype")
def precision_that_is_read(world: World) -> Change:
    world.model.float()
    yield
    world.model.double()


def _option(key: str, value: Any) -> Callable[[World], Change]:
    def make(world: World) -> Change:
        if key in world.options:
            yield from put_item(world.options, key, value)
            return
        world.options[key] = value
        yield
        world.options.pop(key, None)

    return make


change(name="inner rate")(_option("inner_lr", 0.05))
change(name="inner rate, a tensor")(_option("inner_lr", torch.tensor(0.05)))
change(name="inner steps")(_option("inner_steps", 1))
change(name="no inner steps")(_option("inner_steps", 0))
change(name="first order")(_option("first_order", True))
change(name="proximal term")(_option("prox", 0.3))


@change()
def adapted_part(world: World) -> Change:
    last = [name for name, _ in world.model.named_children()][-1]
    yield from _option("adapt", last)(world)
