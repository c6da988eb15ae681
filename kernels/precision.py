"""Products of tiles in float32, TF32 or bfloat16."""

import triton
import triton.language as tl


@triton.jit
def dot(left, right, sum, PRECISION: tl.constexpr):
    """`left right + sum`."""
    if PRECISION == "bf16":
        sum = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), sum)
    else:
        sum = tl.dot(left, right, sum, input_precision=PRECISION, out_dtype=sum.dtype)
    return sum
