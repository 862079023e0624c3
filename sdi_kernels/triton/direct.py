"""The ``direct`` route: tiles of the weight gradient on tensor cores, scattered into m buckets from registers.

A program forms one tile of ``G = sum_l delta_l (x) a_l`` with fp32 accumulation (the weight-gradient product of plain
training), multiplies it by the signs and, where asked for, by a tile of an elementwise metric, and adds it
to the sketch at ``h_out(i) + h_in(j) mod m`` with float atomics. G never reaches memory. Any hash family, any m.

Atomics add in the order the programs happen to run in: :mod:`sdi_kernels.triton.launch` takes another route where
``torch.use_deterministic_algorithms`` is on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdi_kernels.calls import LinearCall, LinearStepsCall
from sdi_kernels.triton import common, configs, tuning
from sdi_kernels.triton.rounding import operand
from sdi_kernels.triton.uses import PAIR, pair, slot, work


@triton.jit
def _add_products(
    b_acc, p_a, p_g, stride_at, stride_ad, stride_gt, stride_gd, i_first, i_last, o_o, o_i, d_out, d_in,
    BLOCK_T: tl.constexpr, IS_HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``sum_l delta_l (x) a_l`` over tokens ``i_first`` to ``i_last`` of one row."""
    o_t = i_first + tl.arange(0, BLOCK_T)
    p_ax = p_a + o_t.to(tl.int64)[:, None] * stride_at + o_i.to(tl.int64)[None, :] * stride_ad
    p_gx = p_g + o_t.to(tl.int64)[:, None] * stride_gt + o_o.to(tl.int64)[None, :] * stride_gd
    step_a = BLOCK_T * tl.cast(stride_at, tl.int64)
    step_g = BLOCK_T * tl.cast(stride_gt, tl.int64)
    m_o = o_o < d_out
    m_i = o_i < d_in
    for i_t in range(i_first, i_last, BLOCK_T):
        m_t = i_t + tl.arange(0, BLOCK_T) < i_last
        b_a = tl.load(p_ax, mask=m_t[:, None] & m_i[None, :], other=0.0)
        b_g = tl.load(p_gx, mask=m_t[:, None] & m_o[None, :], other=0.0)
        if not IS_HALF:
            b_a = operand(b_a.to(tl.float32), PRECISION)
            b_g = operand(b_g.to(tl.float32), PRECISION)
        b_acc = tl.dot(tl.trans(b_g), b_a, b_acc, input_precision=PRECISION)
        p_ax += step_a
        p_gx += step_g
    return b_acc


# Counts of rows and tokens vary from call to call and gain nothing from a program of their own.
@triton.jit(do_not_specialize=["rows", "tokens", "tokens_per_split"])
def direct_sketch_kernel(
    p_out, p_a, p_g, p_table, p_h_out, p_s_out, p_h_in, p_s_in, p_metric, rows, tokens, tokens_per_split, d_out, d_in,
    m, stride_or, stride_om, stride_ar, stride_at, stride_ad, stride_gr, stride_gt, stride_gd, stride_mo, stride_mi,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, HAS_METRIC: tl.constexpr,
    IS_HALF: tl.constexpr, IS_WIDE: tl.constexpr, PRECISION: tl.constexpr, IS_LIST: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Add the sketch of one [BLOCK_O, BLOCK_I] tile of one row's gradient. Grid: (slots * rows * tiles, splits)."""
    tiles_in = tl.cdiv(d_in, BLOCK_I)
    tiles = tl.cdiv(d_out, BLOCK_O) * tiles_in
    # Tiles of a row run next to each other, so that its activations are read from L2 but once from memory.
    i_tile = tl.program_id(0) % tiles
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    i_first = tl.program_id(1) * tokens_per_split
    i_last = i_first + tokens_per_split
    o_o = (i_tile // tiles_in) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = (i_tile % tiles_in) * BLOCK_I + tl.arange(0, BLOCK_I)

    b_acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
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
                b_acc, p_ax, p_gx, step_a, stride_ad, step_g, stride_gd, i_t, i_end, o_o, o_i, d_out, d_in,
                BLOCK_T, IS_HALF, PRECISION,
            )  # fmt: skip
            p_pair += PAIR
    else:
        b_acc = _add_products(
            b_acc, p_a + i_row * stride_ar, p_g + i_row * stride_gr, stride_at, stride_ad, stride_gt, stride_gd,
            i_first, tl.minimum(i_last, tokens), o_o, o_i, d_out, d_in, BLOCK_T, IS_HALF, PRECISION,
        )  # fmt: skip

    m_o = o_o < d_out
    m_i = o_i < d_in
    m_tile = m_o[:, None] & m_i[None, :]
    if HAS_METRIC:
        p_tile = p_metric + o_o.to(tl.int64)[:, None] * stride_mo + o_i.to(tl.int64)[None, :] * stride_mi
        b_acc *= tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    s_o = tl.load(p_s_out + o_o, mask=m_o, other=0).to(tl.float32)
    s_i = tl.load(p_s_in + o_i, mask=m_i, other=0).to(tl.float32)
    h_o = tl.load(p_h_out + o_o, mask=m_o, other=0)
    h_i = tl.load(p_h_in + o_i, mask=m_i, other=0)
    o_pos = h_o[:, None] + h_i[None, :]
    # A hint that nothing reads by, and that need not be true: lanes go along the row.
    o_pos = tl.max_contiguous(tl.where(o_pos >= m, o_pos - m, o_pos), (1, BLOCK_I))
    if IS_WIDE:
        o_pos = o_pos.to(tl.int64)
    p_bin = p_out + i_row * stride_or + o_pos * stride_om
    tl.atomic_add(p_bin, b_acc * s_o[:, None] * s_i[None, :], mask=m_tile, sem="relaxed")


def linear_direct(call: LinearCall | LinearStepsCall) -> None:
    """Add the TensorSketch of each row's weight gradient ``G`` (or ``metric * G``) to ``out``, by one launch.

    ``out`` is float32, activations and gradients float32, bfloat16 or float16, all of any strides.
    """
    found = work(call)
    if found is None:
        return
    out, metric, m = found.out, call.metric, call.m
    h_out, s_out, _, h_in, s_in, _ = call.tables
    d_out, d_in = len(h_out), len(h_in)
    a, g = found.activations, found.grad_outputs
    kind = configs.kind(a.dtype, g.dtype)
    config = tuning.tuned(out.device).tile(configs.direct_key(d_out, d_in, kind))
    assert isinstance(config, configs.DirectConfig)
    programs = found.slots * found.rows * common.cdiv(d_out, config.block_out) * common.cdiv(d_in, config.block_in)
    # Every split pays the epilogue's atomics again, so parts are kept long.
    splits, per_split = common.parts(programs, found.tokens, config.block_tokens, 8, out.device)
    entries = out if metric is None else metric  # a pointer that stands in is never read
    direct_sketch_kernel[(programs, splits)](
        out, a, g, found.table, h_out, s_out, h_in, s_in, entries, found.rows, found.tokens, per_split,
        d_out, d_in, m, *out.stride(), *found.strides, *entries.stride(),
        BLOCK_O=config.block_out, BLOCK_I=config.block_in, BLOCK_T=config.block_tokens,
        HAS_METRIC=metric is not None,
        IS_HALF=kind == "half",
        IS_WIDE=common.wide(out), PRECISION=common.dot_precision(a, g),
        num_warps=config.num_warps, num_stages=config.num_stages, **found.constants,
    )  # fmt: skip
