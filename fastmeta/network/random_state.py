"""The states of torch's random generators: read, put back, and left as they were found."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor


def generators(device: torch.device) -> list[Tensor]:
    """The states of the generators that a pass may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def have_moved(before: list[Tensor], device: torch.device) -> bool:
    """Return whether something has been drawn since."""
    now = generators(device)
    # `torch.equal` takes ten times as long.
    return any(a.numpy().tobytes() != b.numpy().tobytes() for a, b in zip(before, now, strict=True))


def set_generators(states: list[Tensor], device: torch.device) -> None:
    """Put the generators back to `states`."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def same_random_numbers(
    device: torch.device, states: list[Tensor] | None = None
) -> Generator[None, None, None]:
    """Leave the generators as they were found; draw from `states` meanwhile, where given."""
    before = generators(device)
    try:
        if states is not None:
            set_generators(states, device)
        yield
    finally:
        set_generators(before, device)
