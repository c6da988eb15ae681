"""Drawing without replacement, for many rows at once."""

import torch
from torch import Tensor


def draw_without_replacement(populations: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draw `draws` different numbers below `populations[r]`, in random order, in every row r.

    Floyd's algorithm: the i-th draw is from the first `population - draws + i + 1` numbers, and one
    that was already taken is replaced by the last of them, which can't have been. That makes every
    set equally likely but not every order (the highest numbers can only come late), so each row is
    shuffled afterwards. The work does not grow with the population.

    **Arguments:** `populations`: int64 [R], each at least `draws`. `generator`: on its device.

    **Returns:** int64 [R, draws].

    **Source:** Bentley, Floyd (1987), Programming Pearls: a sample of brilliance.
    """
    rows = len(populations)
    device = populations.device
    steps = torch.arange(draws, device=device)[:, None]  # [draws, 1]
    last = populations - draws + steps  # [draws, R]
    # A remainder of 62 random bits is biased by less than one part in 2**40 for any real population
    bits = torch.randint(2**62, (draws, rows), generator=generator, device=device)
    drawn = bits % (last + 1)  # [draws, R]
    for i in range(1, draws):
        taken = (drawn[:i] == drawn[i]).any(0)  # [R]
        drawn[i] = torch.where(taken, last[i], drawn[i])
    order = torch.rand(rows, draws, generator=generator, device=device).argsort(1)
    return drawn.T.gather(1, order)
