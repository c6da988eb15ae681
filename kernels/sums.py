"""The sum over tasks, in a fixed order: the same bits at every run."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["start", "stride", "tasks", "count"])
def sum_kernel(
    out, buffer, weights, start, stride, tasks, count, BT: tl.constexpr, BP: tl.constexpr
):
    """`out[p] = sum_t weights[t] * buffer[start + t * stride + p]`, p below `count`."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    total = tl.zeros((BT, BP), buffer.dtype.element_ty)
    for first in range(0, tasks, BT):
        t = first + tl.arange(0, BT)
        inside = (t < tasks)[:, None] & (p < count)[None, :]
        weight = tl.load(weights + t, mask=t < tasks, other=0.0)
        at = buffer + start + t.to(tl.int64)[:, None] * stride + p[None, :]
        total += weight[:, None] * tl.load(at, mask=inside, other=0.0)
    tl.store(out + p, tl.sum(total, axis=0), mask=p < count)
