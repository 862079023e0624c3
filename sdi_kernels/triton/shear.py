"""The ``shear`` route: the ``direct`` product with the anti-diagonal sums taken inside it, for R times fewer atomics.

Let R = 16 consecutive buckets ``base + r`` belong together (a block), and let the input side be ``h_in(j) = j``. Then

    out[base + c] += sum_{l, r} delta[l, row(base + r)] a[l, c - r],

a matrix product with K = (l, r) whose second operand is the activation row read at a shift of r. Entries of the
gradient that share a bucket within the block are added up in the accumulator, so that a program sends one atomic per
(block, c) instead of one per entry of the gradient. FLOPs are those of ``direct`` where the blocks are full: the
``block`` family (:mod:`sdi_kernels.hashing`) deals the output side into as few of them as its variance bound allows.
Any other table of the output side works too, with more zeros.

Signs are applied to the operands as they are loaded; with 16-bit inputs that is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdi_kernels.calls import LinearCall, LinearStepsCall
from sdi_kernels.hashing import BLOCK_BUCKETS
from sdi_kernels.triton import common, configs, tuning
from sdi_kernels.triton.rounding import operand
from sdi_kernels.triton.uses import PAIR, pair, slot, work


@triton.jit
def _tile_of_blocks(p_table, i_first, m, width, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr):
    """Bases of the blocks number ``i_first ...`` among those with a source, and which of them exist: [BLOCKS] twice.

    A program finds them by itself, so that the operator needs no other tables and the host need not wait for any.
    """
    o_g = tl.arange(0, GROUPS)
    o_bucket = (o_g[:, None] * R + tl.arange(0, R)[None, :]) * width
    v = tl.load(p_table + o_bucket, mask=(o_g < m // R)[:, None], other=0)  # holes come last: the first source tells
    b_used = tl.max((v != 0).to(tl.int32), 1)
    o_rank = tl.cumsum(b_used, 0) - b_used
    o_wanted = i_first + tl.arange(0, BLOCKS)
    m_hit = (o_rank[None, :] == o_wanted[:, None]) & (b_used != 0)[None, :]
    return tl.sum(tl.where(m_hit, (o_g * R)[None, :], 0), 1), tl.sum(m_hit.to(tl.int32), 1) != 0


@triton.jit
def _add_products(
    b_acc, p_a, p_g, stride_at, stride_ad, stride_gt, stride_gd, i_first, i_last, p_source, m_base, p_s_in, o_k, o_c,
    d_in, width, R: tl.constexpr, BLOCK_T: tl.constexpr, IS_HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the products of tokens ``i_first`` to ``i_last`` of one row."""
    o_kt = o_k // R
    o_kr = o_k % R
    o_j = o_c[None, :] - o_kr[:, None]
    m_j = (o_j >= 0) & (o_j < d_in)
    m_minus = tl.load(p_s_in + o_j, mask=m_j, other=1) < 0
    # A row's own offset and a column's: a tile of 64-bit pointers would take a quarter of the registers.
    p_ax = p_a - o_kr * stride_ad
    o_ac = (o_c * stride_ad)[None, :]
    for i_source in range(width):  # more than one where d_out > m: each takes the products of its own
        v = tl.load(p_source + i_source, mask=m_base[:, None], other=0)
        o_gv = (tl.abs(v) - 1) * stride_gd
        for i_t in range(i_first, i_last, BLOCK_T):
            o_t = (i_t + o_kt).to(tl.int64)
            m_t = o_t < i_last
            b_g = tl.load((p_g + o_t * stride_gt)[None, :] + o_gv, mask=(v != 0) & m_t[None, :], other=0.0)
            b_a = tl.load((p_ax + o_t * stride_at)[:, None] + o_ac, mask=m_j & m_t[:, None], other=0.0)
            if not IS_HALF:
                b_g = operand(b_g.to(tl.float32), PRECISION)
                b_a = operand(b_a.to(tl.float32), PRECISION)
            b_g *= tl.where(v < 0, -1.0, 1.0).to(b_g.dtype)
            b_a = tl.where(m_minus, -b_a, b_a)
            b_acc = tl.dot(b_g, b_a, b_acc, input_precision=PRECISION)
    return b_acc


# Counts of rows and tokens vary from call to call and gain nothing from a program of their own.
@triton.jit(do_not_specialize=["rows", "tokens", "tokens_per_split"])
def shear_sketch_kernel(
    p_out, p_a, p_g, p_table, p_table_out, p_s_in, rows, tokens, tokens_per_split, d_in, m, width,
    stride_or, stride_om, stride_ar, stride_at, stride_ad, stride_gr, stride_gt, stride_gd,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr,
    IS_HALF: tl.constexpr, IS_WIDE: tl.constexpr, PRECISION: tl.constexpr, IS_LIST: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Add the sketch of BLOCKS blocks of rows, COLUMNS columns of one row's gradient.

    Grid: (slots * rows * tiles, splits).
    """
    tiles_c = tl.cdiv(d_in + R - 1, COLUMNS)
    tiles = tl.cdiv(m // R, BLOCKS) * tiles_c
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    i_first = tl.program_id(1) * tokens_per_split
    i_last = i_first + tokens_per_split
    o_base, m_base = _tile_of_blocks(p_table_out, (i_tile // tiles_c) * BLOCKS, m, width, BLOCKS, GROUPS, R)
    if tl.max(m_base.to(tl.int32), 0) == 0:  # fewer blocks are in use than there are
        return

    o_k = tl.arange(0, BLOCK_T * R)
    o_c = (i_tile % tiles_c) * COLUMNS + tl.arange(0, COLUMNS)
    p_source = p_table_out + (o_base[:, None] + (o_k % R)[None, :]) * width
    if IS_WIDE:
        stride_ad = tl.cast(stride_ad, tl.int64)
        stride_gd = tl.cast(stride_gd, tl.int64)
    b_acc = tl.zeros((BLOCKS, COLUMNS), tl.float32)
    if IS_LIST:
        p_pair, pairs, slot_rows, offset = slot(p_table, i_row // rows)
        i_row %= rows
        if i_row >= slot_rows:
            return
        p_out += offset
        for _ in range(pairs):
            p_ax, p_gx, step_a, step_g, length, before = pair(p_pair, p_a, p_g, i_row, IS_ALIGNED)
            i_t, i_end = tl.maximum(i_first - before, 0), tl.minimum(i_last - before, length)
            b_acc = _add_products(
                b_acc, p_ax, p_gx, step_a, stride_ad, step_g, stride_gd, i_t, i_end, p_source, m_base, p_s_in, o_k,
                o_c, d_in, width, R, BLOCK_T, IS_HALF, PRECISION,
            )  # fmt: skip
            p_pair += PAIR
    else:
        b_acc = _add_products(
            b_acc, p_a + i_row * stride_ar, p_g + i_row * stride_gr, stride_at, stride_ad, stride_gt, stride_gd,
            i_first, tl.minimum(i_last, tokens), p_source, m_base, p_s_in, o_k, o_c, d_in, width, R, BLOCK_T,
            IS_HALF, PRECISION,
        )  # fmt: skip

    o_pos = o_base[:, None] + o_c[None, :]
    # A hint that nothing reads by, and that need not be true: lanes go along the row.
    o_pos = tl.max_contiguous(tl.where(o_pos >= m, o_pos - m, o_pos), (1, COLUMNS))
    if IS_WIDE:
        o_pos = o_pos.to(tl.int64)
    m_tile = m_base[:, None] & (o_c < d_in + R - 1)[None, :]
    tl.atomic_add(p_out + i_row * stride_or + o_pos * stride_om, b_acc, mask=m_tile, sem="relaxed")


def linear_shear(call: LinearCall | LinearStepsCall) -> None:
    """Add the TensorSketch of each row's weight gradient to ``out``, by one launch.

    Without a metric, for tables with ``h_in(j) = j`` (it is not looked at), d_in <= m and m a multiple of 16.
    ``out`` is float32, activations and gradients float32, bfloat16 or float16, all of any strides.
    """
    found = work(call)
    if found is None:
        return
    out, m = found.out, call.m
    table_out, s_in = call.tables[2], call.tables[4]
    a, g, d_in = found.activations, found.grad_outputs, len(s_in)
    kind = configs.kind(a.dtype, g.dtype)
    config = tuning.tuned(out.device).tile(f"shear {kind}")
    assert isinstance(config, configs.ShearConfig)
    groups = m // BLOCK_BUCKETS
    # At most so many blocks are in use; programs beyond them return at once.
    tiles = common.cdiv(groups, config.blocks) * common.cdiv(d_in + BLOCK_BUCKETS - 1, config.columns)
    programs = found.slots * found.rows * tiles
    splits, per_split = common.parts(programs, found.tokens, config.tokens, 32, out.device)
    shear_sketch_kernel[(programs, splits)](
        out, a, g, found.table, table_out, s_in, found.rows, found.tokens, per_split, d_in, m,
        table_out.shape[1], *out.stride(), *found.strides,
        BLOCKS=config.blocks, COLUMNS=config.columns, BLOCK_T=config.tokens,
        GROUPS=max(2, 1 << (groups - 1).bit_length()), R=BLOCK_BUCKETS,
        IS_HALF=kind == "half", IS_WIDE=any(map(common.wide, (out, a, g))), PRECISION=common.dot_precision(a, g),
        num_warps=config.num_warps, num_stages=config.num_stages, **found.constants,
    )  # fmt: skip
