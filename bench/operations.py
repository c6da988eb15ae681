"""The arithmetic that a second-order meta-step of an MLP cannot do without."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def of_step(
    widths: Sequence[int],
    tasks: int,
    support: int,
    query: int,
    steps: int,
    *,
    dual: bool = False,
    body: int = 0,
) -> int:
    """Operations of a step's matrix products, two a multiply-add.

    Multiply-adds of one task, with N support and Q query examples, K >= 1 inner steps:

    - a layer D -> H:              (9 K N + 3 Q) D H
      An inner step takes 3 products (forward, gradients of weight and input), each Hessian-vector
      product 6 (two for the tangent of each), the query set 3.
    - the first, whose input is data, without gradient and tangent of that: (4 K N + 2 Q) D H
    - the first in dual form:      2 (N + Q) D H + (N + Q) N D + (2 K - 1) N^2 H + 2 Q N H
      Products with the weight and for its gradient, Gram matrices, and products with those:
      K - 1 forward, K tangents, two of the query set.
    - of a `body` of frozen layers:  3 (N + Q) D H, the first 2 (N + Q) D H
      They are run once; the layer behind them, whose input has no tangent and inside the inner
      step no gradient:            (6 K N + 3 Q) D H

    Biases, activations and losses are left out: they are no products.
    """
    n, q, k = support, query, steps
    total = 0
    for i, (d, h) in enumerate(itertools.pairwise(widths)):
        if i < body:
            total += (2 if i == 0 else 3) * (n + q) * d * h
        elif i == body > 0:
            total += (6 * k * n + 3 * q) * d * h
        elif i > 0:
            total += (9 * k * n + 3 * q) * d * h
        elif dual:
            total += 2 * (n + q) * d * h + (n + q) * n * d + (2 * k - 1) * n * n * h + 2 * q * n * h
        else:
            total += (4 * k * n + 2 * q) * d * h
    return 2 * tasks * total
