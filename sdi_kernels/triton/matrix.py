"""TensorSketch of gradients that are already there as matrices, optionally times an elementwise metric.

``gather``: a program owns a block of buckets of one row and walks over the lines of the matrix: bucket p takes from
line i the sources of bucket ``p - h_out(i)`` of the input side. Every entry is read once, sums stay in registers, and
there are no atomics unless the lines of few rows are split to fill the device. It looks at every bucket for every
line, so it serves where a line has about as many entries as there are buckets.
``scatter``: a program reads a tile of the matrix and adds it to its buckets with float atomics. It serves lines much
shorter than the sketch, unless ``torch.use_deterministic_algorithms`` asks for no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sdi_kernels.calls import MatrixCall
from sdi_kernels.triton import common

BLOCK_O = 8
BLOCK_M = 256
TILE_O = 16
TILE_I = 128
NUM_WARPS = 4

ATOMIC_COST = 4
"""Buckets that a gather may look at for one entry of the matrix before scattering is taken for cheaper. An estimate."""


@triton.jit
def _entries(p_x, p_metric, o_o, o_i, mask, stride_xo, stride_xi, stride_mo, stride_mi, HAS_METRIC: tl.constexpr):
    """Entries [o_o, o_i] of one row's matrix in fp32, times the metric's where there is one."""
    o_o = o_o.to(tl.int64)
    o_i = o_i.to(tl.int64)
    b_x = tl.load(p_x + o_o * stride_xo + o_i * stride_xi, mask=mask, other=0.0).to(tl.float32)
    if HAS_METRIC:
        b_x *= tl.load(p_metric + o_o * stride_mo + o_i * stride_mi, mask=mask, other=0.0).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=["lines_per_split"])
def matrix_gather_kernel(
    p_out, p_x, p_metric, p_h_out, p_s_out, p_table, d_out, lines_per_split, m, width,
    stride_or, stride_om, stride_xr, stride_xo, stride_xi, stride_mo, stride_mi,
    BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, HAS_METRIC: tl.constexpr, IS_ATOMIC: tl.constexpr,
):  # fmt: skip
    """Sketch of BLOCK_M buckets over one split of a matrix's lines. Grid: (rows * tiles of m, splits)."""
    tiles = tl.cdiv(m, BLOCK_M)
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < m
    i_first = tl.program_id(1) * lines_per_split
    i_last = tl.minimum(i_first + lines_per_split, d_out)
    p_x += i_row * stride_xr
    b_acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for i_o in range(i_first, i_last, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        m_o = o_o < i_last
        h_o = tl.load(p_h_out + o_o, mask=m_o, other=0)
        s_o = tl.load(p_s_out + o_o, mask=m_o, other=0).to(tl.float32)
        o_q = o_m[None, :] - h_o[:, None]
        o_q = tl.where(o_q < 0, o_q + m, o_q)
        b_line = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        for j in range(width):
            v = tl.load(p_table + o_q.to(tl.int64) * width + j, mask=m_o[:, None] & m_m[None, :], other=0)
            b_x = _entries(
                p_x,
                p_metric,
                o_o[:, None],
                tl.abs(v) - 1,
                v != 0,
                stride_xo,
                stride_xi,
                stride_mo,
                stride_mi,
                HAS_METRIC,
            )
            b_line += tl.where(v < 0, -b_x, b_x)
        b_acc += b_line * s_o[:, None]
    b_sum = tl.sum(b_acc, 0)
    p_bin = p_out + i_row * stride_or + o_m.to(tl.int64) * stride_om
    if IS_ATOMIC:
        tl.atomic_add(p_bin, b_sum, mask=m_m, sem="relaxed")
    else:
        tl.store(p_bin, tl.load(p_bin, mask=m_m, other=0.0) + b_sum, mask=m_m)


@triton.jit
def matrix_scatter_kernel(
    p_out, p_x, p_metric, p_h_out, p_s_out, p_h_in, p_s_in, d_out, d_in, m,
    stride_or, stride_om, stride_xr, stride_xo, stride_xi, stride_mo, stride_mi,
    TILE_O: tl.constexpr, TILE_I: tl.constexpr, HAS_METRIC: tl.constexpr,
):  # fmt: skip
    """Add one [TILE_O, TILE_I] tile of a matrix to the buckets. Grid: (rows * tiles,)."""
    tiles_in = tl.cdiv(d_in, TILE_I)
    tiles = tl.cdiv(d_out, TILE_O) * tiles_in
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    o_o = (i_tile // tiles_in) * TILE_O + tl.arange(0, TILE_O)
    o_i = (i_tile % tiles_in) * TILE_I + tl.arange(0, TILE_I)
    m_o = o_o < d_out
    m_i = o_i < d_in
    m_tile = m_o[:, None] & m_i[None, :]
    b_x = _entries(
        p_x + i_row * stride_xr, p_metric, o_o[:, None], o_i[None, :], m_tile, stride_xo, stride_xi,
        stride_mo, stride_mi, HAS_METRIC,
    )  # fmt: skip
    s_o = tl.load(p_s_out + o_o, mask=m_o, other=0).to(tl.float32)
    s_i = tl.load(p_s_in + o_i, mask=m_i, other=0).to(tl.float32)
    o_pos = tl.load(p_h_out + o_o, mask=m_o, other=0)[:, None] + tl.load(p_h_in + o_i, mask=m_i, other=0)[None, :]
    # A hint that nothing reads by, and that need not be true: lanes go along the row.
    o_pos = tl.max_contiguous(tl.where(o_pos >= m, o_pos - m, o_pos), (1, TILE_I))
    p_bin = p_out + i_row * stride_or + o_pos.to(tl.int64) * stride_om
    tl.atomic_add(p_bin, b_x * s_o[:, None] * s_i[None, :], mask=m_tile, sem="relaxed")


def matrix(call: MatrixCall) -> None:
    """Add the TensorSketch of each row's matrix ``G`` (or ``metric * G``) to ``out``.

    ``out`` is float32, gradients float32, bfloat16 or float16, the metric of any floating dtype, all of any strides.
    """
    out, grads, tables, m, metric = call
    rows, d_out, d_in = grads.shape
    if rows == 0:
        return
    h_out, s_out, _, h_in, s_in, table_in = tables
    width = table_in.shape[1]
    entries = out if metric is None else metric  # a pointer that stands in is never read
    strides = (*out.stride(), *grads.stride(), *entries.stride())
    deterministic = torch.are_deterministic_algorithms_enabled()
    if not deterministic and m * width > ATOMIC_COST * d_in:
        programs = rows * common.cdiv(d_out, TILE_O) * common.cdiv(d_in, TILE_I)
        matrix_scatter_kernel[(programs,)](
            out, grads, entries, h_out, s_out, h_in, s_in, d_out, d_in, m, *strides,
            TILE_O=TILE_O, TILE_I=TILE_I, HAS_METRIC=metric is not None, num_warps=NUM_WARPS,
        )  # fmt: skip
        return
    programs = rows * common.cdiv(m, BLOCK_M)
    splits, per_split = common.parts(programs, d_out, BLOCK_O, 4, out.device, whole=deterministic)
    matrix_gather_kernel[(programs, splits)](
        out, grads, entries, h_out, s_out, table_in, d_out, per_split, m, width, *strides,
        BLOCK_O=BLOCK_O, BLOCK_M=BLOCK_M, HAS_METRIC=metric is not None, IS_ATOMIC=splits > 1, num_warps=NUM_WARPS,
    )  # fmt: skip
