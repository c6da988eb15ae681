"""The step's kernel: a program a task, which works through a table of operations."""

import triton
import triton.language as tl

from fastmeta.kernels import record as r
from fastmeta.kernels.losses import loss
from fastmeta.kernels.norms import norm
from fastmeta.kernels.products import product


@triton.jit(do_not_specialize=["count"])
def step_kernel(
    buffer, operations, numbers, count,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All `count` operations of one task, each seeing what the ones before it wrote."""
    task = tl.program_id(0).to(tl.int64)
    for index in range(count):
        op = operations + index * r.FIELDS
        of_op = numbers + index * r.NUMBERS
        kind = tl.load(op + r.KIND)
        if kind <= r.LAST_PRODUCT:
            product(buffer, op, of_op, task, BM, BN, BK, PRECISION)
        elif kind <= r.NORM_TANGENT_BACKWARD:
            norm(buffer, op, of_op, task, BM, BN)
        else:
            loss(buffer, op, of_op, task, BM, BN)
        tl.debug_barrier()


INTERPRETED = not isinstance(step_kernel, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels: on the host, for tests."""
