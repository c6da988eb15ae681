"""The random generator a data source draws from: its own, never torch's global one."""

import torch


def seeded_generator(seed: int | None, device: torch.device | str | None) -> torch.Generator:
    """Make a generator on `device`, repeatable where a seed is given.

    **Arguments:** `seed`: any integer, or None for a fresh one from the system. `device`: where
    the draws are made; None is the CPU.

    **Returns:** a `torch.Generator`. Drawing from it leaves torch's global generators alone.
    """
    generator = torch.Generator(device="cpu" if device is None else device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def require_positive(name: str, value: object) -> None:
    """Complain unless `value` is a whole number from 1 up."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {value!r}; it must be a whole number from 1 up")
