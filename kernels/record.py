"""An operation's record: what the kernel reads of it, and where.

A step is a table of operations on matrices. A record is `FIELDS` integers and `NUMBERS` floats: the
kind of the operation, its sizes, its activation or loss, and the views that it works on. A view is
four integers: offset in the buffer, strides from task to task, from row to row, from column to
column. A stride of 0 repeats what is there, and a view of four zeros is 0 throughout: that is what
the buffer begins with. This file is the one that both sides read: the kernels, and who writes the
table.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(88)
NUMBERS = tl.constexpr(4)

# The integers.
KIND = tl.constexpr(0)
ROWS = tl.constexpr(1)
COLS = tl.constexpr(2)
DEPTH = tl.constexpr(3)  # of the product
DEPTH2 = tl.constexpr(4)  # of the one added to it
FUNCTION = tl.constexpr(5)  # an activation
LOSS = tl.constexpr(6)
VIEWS = tl.constexpr(8)  # where they begin

# Kinds: a product with what is done to its sum (products.py), ...
SET = tl.constexpr(0)
ADD = tl.constexpr(1)
FORWARD = tl.constexpr(2)
THROUGH = tl.constexpr(3)
DESCEND = tl.constexpr(4)
SUBTRACT = tl.constexpr(5)
RATE_EACH = tl.constexpr(6)
RATE_SUM = tl.constexpr(7)
LAST_PRODUCT = tl.constexpr(7)
# ... the rules of a norm (norms.py), ...
NORM_FORWARD = tl.constexpr(8)
NORM_BACKWARD = tl.constexpr(9)
NORM_TANGENT_FORWARD = tl.constexpr(10)
NORM_TANGENT_BACKWARD = tl.constexpr(11)
# ... and of a loss (losses.py).
LOSS_FORWARD = tl.constexpr(12)
LOSS_TANGENT = tl.constexpr(13)


@triton.jit
def view(buffer, op, task, INDEX: tl.constexpr):
    """Where a view's matrix begins for this task, and its strides."""
    at = op + VIEWS + 4 * INDEX
    start = buffer + tl.load(at) + tl.load(at + 1) * task
    # A task's matrix is shorter than 2 ** 31.
    return start, tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)


@triton.jit
def tile(buffer, op, task, INDEX: tl.constexpr, i, j, inside):
    """The numbers of a view at rows `i` and columns `j`; 0 where not `inside`."""
    start, row, col = view(buffer, op, task, INDEX)
    return tl.load(start + i[:, None] * row + j[None, :] * col, mask=inside, other=0.0)


@triton.jit
def put(value, buffer, op, task, INDEX: tl.constexpr, i, j, inside):
    """Writes them."""
    start, row, col = view(buffer, op, task, INDEX)
    tl.store(start + i[:, None] * row + j[None, :] * col, value, mask=inside)


@triton.jit
def row_of(buffer, op, task, INDEX: tl.constexpr, j, inside):
    """The numbers of a view of one row [1, H] at columns `j`."""
    start, _, col = view(buffer, op, task, INDEX)
    return tl.load(start + j * col, mask=inside, other=0.0)


@triton.jit
def put_row(value, buffer, op, task, INDEX: tl.constexpr, j, inside):
    """Writes them."""
    start, _, col = view(buffer, op, task, INDEX)
    tl.store(start + j * col, value, mask=inside)


@triton.jit
def number(numbers, INDEX: tl.constexpr, like):
    """A number of the record, in the type of `like`."""
    return tl.load(numbers + INDEX).to(like.dtype.element_ty)
