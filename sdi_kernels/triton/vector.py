"""CountSketch of the token sum of vector gradients: biases, and the gains of norms and gates.

A gain's gradient, ``sum_l grads[l] * (factors[l] - center[l]) * scale[l]``, is formed on the way: in registers, from
the gradients at the layer's output and what the gain multiplies.

``scatter``: a program sums a block of features over tokens, reading them as they lie in memory, and adds the sums to
their buckets: plain adds where no two features share a bucket and one program sees all tokens, atomics otherwise.
``gather``: a program owns a block of buckets and sums their sources; no atomics, scattered reads. It serves
``torch.use_deterministic_algorithms`` where features share buckets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sdi_kernels.calls import ScaledVectorCall, VectorCall
from sdi_kernels.triton import common

BLOCK_T = 16
BLOCK_D = 128
NUM_WARPS = 4


@triton.jit
def _gradients(
    p_g, p_x, p_c, p_s, i_row, o_t, o_d, mask, m_t, stride_gr, stride_gt, stride_gd, stride_xr, stride_xt, stride_xd,
    stride_cr, stride_ct, stride_sr, stride_st,
    HAS_FACTORS: tl.constexpr, HAS_CENTER: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of tokens (rows, o_t) and features (columns, o_d) in fp32."""
    o_t = o_t.to(tl.int64)
    o_d = o_d.to(tl.int64)
    b_g = tl.load(p_g + i_row * stride_gr + o_t * stride_gt + o_d * stride_gd, mask=mask, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        b_x = tl.load(p_x + i_row * stride_xr + o_t * stride_xt + o_d * stride_xd, mask=mask, other=0.0).to(tl.float32)
        if HAS_CENTER:
            b_x -= tl.load(p_c + i_row * stride_cr + o_t * stride_ct, mask=m_t, other=0.0).to(tl.float32)
        if HAS_SCALE:
            b_x *= tl.load(p_s + i_row * stride_sr + o_t * stride_st, mask=m_t, other=0.0).to(tl.float32)
        b_g *= b_x
    return b_g


# Token counts vary from call to call and gain nothing from a program of their own.
@triton.jit(do_not_specialize=["tokens", "tokens_per_split"])
def vector_scatter_kernel(
    p_out, p_g, p_x, p_c, p_s, p_bucket, p_sign, tokens, tokens_per_split, d, stride_or, stride_om,
    stride_gr, stride_gt, stride_gd, stride_xr, stride_xt, stride_xd, stride_cr, stride_ct, stride_sr, stride_st,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, IS_ATOMIC: tl.constexpr,
    HAS_FACTORS: tl.constexpr, HAS_CENTER: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Sum [tokens, BLOCK_D] over tokens, add to the buckets. Grid: (rows * tiles of d, splits)."""
    tiles = tl.cdiv(d, BLOCK_D)
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    o_d = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d
    i_first = tl.program_id(1) * tokens_per_split
    i_last = tl.minimum(i_first + tokens_per_split, tokens)
    b_acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i_t in range(i_first, i_last, BLOCK_T):
        o_t = (i_t + tl.arange(0, BLOCK_T))[:, None]
        m_t = o_t < i_last
        b_acc += _gradients(
            p_g, p_x, p_c, p_s, i_row, o_t, o_d[None, :], m_t & m_d[None, :], m_t, stride_gr, stride_gt, stride_gd,
            stride_xr, stride_xt, stride_xd, stride_cr, stride_ct, stride_sr, stride_st,
            HAS_FACTORS, HAS_CENTER, HAS_SCALE,
        )  # fmt: skip
    b_sum = tl.sum(b_acc, 0) * tl.load(p_sign + o_d, mask=m_d, other=0).to(tl.float32)
    o_m = tl.load(p_bucket + o_d, mask=m_d, other=0).to(tl.int64)
    p_bin = p_out + i_row * stride_or + o_m * stride_om
    if IS_ATOMIC:
        tl.atomic_add(p_bin, b_sum, mask=m_d, sem="relaxed")
    else:
        tl.store(p_bin, tl.load(p_bin, mask=m_d, other=0.0) + b_sum, mask=m_d)


@triton.jit(do_not_specialize=["tokens"])
def vector_gather_kernel(
    p_out, p_g, p_x, p_c, p_s, p_table, tokens, m, width, stride_or, stride_om,
    stride_gr, stride_gt, stride_gd, stride_xr, stride_xt, stride_xd, stride_cr, stride_ct, stride_sr, stride_st,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_FACTORS: tl.constexpr, HAS_CENTER: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Sum the sources of BLOCK_M buckets over tokens. Grid: (rows * tiles of m,)."""
    tiles = tl.cdiv(m, BLOCK_M)
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < m
    b_acc = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for j in range(width):
        v = tl.load(p_table + o_m * width + j, mask=m_m, other=0)
        o_d = (tl.abs(v) - 1)[None, :]
        m_d = (v != 0)[None, :]
        for i_t in range(0, tokens, BLOCK_T):
            o_t = (i_t + tl.arange(0, BLOCK_T))[:, None]
            m_t = o_t < tokens
            b_x = _gradients(
                p_g, p_x, p_c, p_s, i_row, o_t, o_d, m_t & m_d, m_t, stride_gr, stride_gt, stride_gd,
                stride_xr, stride_xt, stride_xd, stride_cr, stride_ct, stride_sr, stride_st,
                HAS_FACTORS, HAS_CENTER, HAS_SCALE,
            )  # fmt: skip
            b_acc += tl.where((v < 0)[None, :], -b_x, b_x)
    p_bin = p_out + i_row * stride_or + o_m.to(tl.int64) * stride_om
    tl.store(p_bin, tl.load(p_bin, mask=m_m, other=0.0) + tl.sum(b_acc, 0), mask=m_m)


def vector(call: VectorCall | ScaledVectorCall) -> None:
    """Add the CountSketch of each row's token sum to ``out``: of ``grads``, or ``grads * (factors - center) * scale``.

    ``out`` is float32, gradients and factors float32, bfloat16 or float16, center and scale of any real dtype, all of
    any strides.
    """
    out, grads, tables, m = call.out, call.grads, call.tables, call.m
    factors, center, scale = call[2:5] if isinstance(call, ScaledVectorCall) else (None, None, None)
    rows, tokens, d = grads.shape
    if rows == 0 or tokens == 0:
        return
    bucket, sign, table = tables
    deterministic = torch.are_deterministic_algorithms_enabled()
    injective = table.shape[1] == 1
    # Pointers that stand in for what is not given are never read.
    x, c, s = (grads if t is None else t for t in (factors, center, scale))
    strides = (*out.stride(), *grads.stride(), *x.stride(), *c.stride()[:2], *s.stride()[:2])
    given = {"HAS_FACTORS": factors is not None, "HAS_CENTER": center is not None, "HAS_SCALE": scale is not None}
    if deterministic and not injective:
        vector_gather_kernel[(rows * common.cdiv(m, BLOCK_D),)](
            out, grads, x, c, s, table, tokens, m, table.shape[1], *strides,
            BLOCK_T=BLOCK_T, BLOCK_M=BLOCK_D, num_warps=NUM_WARPS, **given,
        )  # fmt: skip
        return
    programs = rows * common.cdiv(d, BLOCK_D)
    splits, per_split = common.parts(programs, tokens, BLOCK_T, 4, out.device, whole=deterministic)
    vector_scatter_kernel[(programs, splits)](
        out, grads, x, c, s, bucket, sign, tokens, per_split, d, *strides,
        BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, IS_ATOMIC=splits > 1 or not injective, num_warps=NUM_WARPS, **given,
    )  # fmt: skip
