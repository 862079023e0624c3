"""Both CountSketches of a block of tokens, loaded through the inverse tables: what :mod:`sdi_kernels.triton.fft` begins
with. A scatter turned into loads: a bucket reads its sources."""

from __future__ import annotations

import triton
import triton.language as tl

from sdi_kernels.triton import slots

HEAD = tl.constexpr(slots.HEAD)


@triton.jit
def gather(p_x, o_source, b_sign, stride, m_token):
    """One signed source of each bucket, in fp32. Empty buckets read feature 0, times zero."""
    return tl.load(p_x + o_source * stride, mask=m_token, other=0.0).to(tl.float32) * b_sign


@triton.jit
def sources(p_table, o_bucket):
    """Feature and sign (0: none) of the first source of each bucket."""
    v = tl.load(p_table + o_bucket)
    # A hint that nothing reads by, and that need not be true: lanes go along the row, as they do in the table.
    o_source = tl.max_contiguous(tl.maximum(tl.abs(v) - 1, 0), (1, v.shape[1]))
    return o_source, tl.where(v < 0, -1.0, (v != 0).to(tl.float32))


@triton.jit
def sums(p_x, p_table, o_bucket, stride, width, m_token):
    """CountSketch of a block of tokens: value of each bucket in ``o_bucket`` = signed sum of its sources, in fp32. One
    source of each after another: two together take registers that the transforms need."""
    b_x = tl.zeros(o_bucket.shape, tl.float32)
    for j in range(width):
        v = tl.load(p_table + o_bucket * width + j)
        o_source = tl.max_contiguous(tl.abs(v) - 1, (1, v.shape[1]))
        x = tl.load(p_x + o_source * stride, mask=(v != 0) & m_token, other=0.0).to(tl.float32)
        b_x += tl.where(v < 0, -x, x)
    return b_x


@triton.jit
def load_slots(p_slots, LINES: tl.constexpr, M: tl.constexpr):
    """``LINES`` lines of slots (:mod:`sdi_kernels.triton.slots`): place of the source, and its sign (0: none). [M] or
    [LINES, M]."""
    if LINES == 1:
        v = tl.load(p_slots + tl.arange(0, M))
    else:
        v = tl.load(p_slots + tl.arange(0, LINES)[:, None] * M + tl.arange(0, M)[None, :])
    return v & 0xFFFF, (v & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def load_row(p_x, stride, d, m_row, ROW: tl.constexpr, IS_NARROW: tl.constexpr):
    """A token's features, in order; zeros from ``d`` on. ``IS_NARROW``: four at a time, as slots are loaded, so that
    nothing has to change places later (a hint that nothing reads by)."""
    o = tl.max_contiguous(tl.arange(0, ROW), 4) if IS_NARROW else tl.arange(0, ROW)
    return tl.load(p_x + o * stride, mask=(o < d) & m_row, other=0.0)


@triton.jit
def take(b_row, o_source, b_sign, LINES: tl.constexpr, CHUNKS: tl.constexpr, M: tl.constexpr):
    """CountSketch of a row, [M] or, of several chunks, [CHUNKS, M]: from shared memory, where a warp's addresses on 32
    lines are some conflicts of banks."""
    if LINES == 1:
        b_x = tl.gather(b_row, o_source, 0).to(tl.float32) * b_sign
    else:
        b_x = tl.gather(b_row, o_source.reshape(LINES * M), 0).reshape(LINES, M).to(tl.float32) * b_sign
        if CHUNKS == 1:
            b_x = tl.sum(b_x, 0)
        elif LINES > CHUNKS:
            b_x = tl.sum(b_x.reshape(CHUNKS, LINES // CHUNKS, M), 1)
    return b_x


@triton.jit
def load_side(
    p_x, stride, d, m_row, ROW: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, M: tl.constexpr,
    IS_NARROW: tl.constexpr,
):  # fmt: skip
    """The row of a token that :func:`sketch_side` takes: of one side in order (``SLOTS`` 0) by chunks."""
    if SLOTS > 0:
        b_row = load_row(p_x, stride, d, m_row, ROW, IS_NARROW)
    else:
        # The hint of load_row.
        o = tl.max_contiguous(tl.arange(0, M), 4)
        if CHUNKS > 1:
            o = tl.max_contiguous(tl.arange(0, CHUNKS)[:, None] * M + o[None, :], (1, 4))
        b_row = tl.load(p_x + o * stride, mask=(o < d) & m_row, other=0.0)
    return b_row


@triton.jit
def sketch_side(
    b_row, p_x, stride, d, o_source, b_sign, p_slots, passes, ROW: tl.constexpr, SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr, M: tl.constexpr, IS_KEPT: tl.constexpr, IS_LONG: tl.constexpr,
):  # fmt: skip
    """CountSketch of one token's side, [M] or [CHUNKS, M], of what :func:`load_side` loaded. ``IS_KEPT``: the slots
    come loaded. ``IS_LONG``: ``b_row`` is for the first of several passes."""
    LINES: tl.constexpr = CHUNKS * (SLOTS if SLOTS > 0 else 1)
    if not IS_KEPT:
        o_source, b_sign = load_slots(p_slots, LINES, M)
    if SLOTS == 0:  # noqa: SIM108
        b_x = b_row.to(tl.float32) * b_sign
    else:
        b_x = take(b_row, o_source, b_sign, LINES, CHUNKS, M)
    if IS_LONG:
        for _ in range(1, passes):
            p_slots += LINES * M + HEAD
            first = tl.multiple_of(tl.load(p_slots - HEAD), 128)
            o_source, b_sign = load_slots(p_slots, LINES, M)
            b_row = load_row(p_x + first * stride, stride, d - first, True, ROW, False)
            b_x += take(b_row, o_source, b_sign, LINES, CHUNKS, M)
    return b_x
