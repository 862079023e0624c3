"""Both CountSketches of a block of tokens, loaded through the inverse tables: what :mod:`sdi_kernels.triton.fft` begins
with. A scatter turned into loads: a bucket reads its sources."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather(p_x, o_source, b_sign, stride, m_token, HAS_MASK: tl.constexpr):
    """One signed source of each bucket, in fp32. Empty buckets read feature 0, times zero."""
    p_x += o_source * stride
    b_x = tl.load(p_x, mask=m_token, other=0.0) if HAS_MASK else tl.load(p_x)
    return b_x.to(tl.float32) * b_sign


@triton.jit
def sources(p_table, o_bucket, IN_LOOP: tl.constexpr):
    """Feature and sign (0: none) of the first source of each bucket. ``IN_LOOP``: read anew for every token."""
    v = tl.load(p_table + o_bucket, volatile=IN_LOOP)
    # A hint that nothing reads by, and that need not be true: lanes go along the row, as they do in the table.
    o_source = tl.max_contiguous(tl.maximum(tl.abs(v) - 1, 0), (1, v.shape[1]))
    return o_source, tl.where(v < 0, -1.0, (v != 0).to(tl.float32))


@triton.jit
def row_sources(p_table, M: tl.constexpr):
    """:func:`sources` of all buckets, [M]."""
    v = tl.load(p_table + tl.arange(0, M))
    return tl.maximum(tl.abs(v) - 1, 0), tl.where(v < 0, -1.0, (v != 0).to(tl.float32))


@triton.jit
def load_row(p_x, stride, d, m_row, ROW: tl.constexpr):
    """A token's ``d`` features, in order."""
    o = tl.arange(0, ROW)
    return tl.load(p_x + o * stride, mask=(o < d) & m_row, other=0.0)


@triton.jit
def gather_row(b_row, o_source, b_sign, N1: tl.constexpr, N2: tl.constexpr):
    """:func:`gather` of all buckets from a row that was loaded: through shared memory, where a warp's addresses on 32
    lines are some conflicts of banks."""
    return (tl.gather(b_row, o_source, 0).to(tl.float32) * b_sign).reshape(N1, N2)


@triton.jit
def gather_rows(b_row, p_table, width, N1: tl.constexpr, N2: tl.constexpr):
    """The same where buckets have up to ``width`` sources, one source of each after another."""
    M: tl.constexpr = N1 * N2
    b_x = tl.zeros((M,), tl.float32)
    for j in range(width):
        v = tl.load(p_table + tl.arange(0, M) * width + j)
        b_sign = tl.where(v < 0, -1.0, (v != 0).to(tl.float32))
        b_x += tl.gather(b_row, tl.maximum(tl.abs(v) - 1, 0), 0).to(tl.float32) * b_sign
    return b_x.reshape(N1, N2)


@triton.jit
def _sums(
    p_x, p_table, o_bucket, stride, width, m_token, MANY: tl.constexpr, HAS_MASK: tl.constexpr
):  # fmt: skip
    """CountSketch of a block: value of each bucket in ``o_bucket`` = signed sum of its sources, in fp32."""
    if not MANY:
        o_source, b_sign = sources(p_table, o_bucket, True)
        b_x = gather(p_x, o_source, b_sign, stride, m_token, HAS_MASK)
    else:  # one source of each after another: two together take registers that the transforms need
        b_x = tl.zeros(o_bucket.shape, tl.float32)
        for j in range(width):
            v = tl.load(p_table + o_bucket * width + j)
            o_source = tl.max_contiguous(tl.abs(v) - 1, (1, v.shape[1]))
            x = tl.load(p_x + o_source * stride, mask=(v != 0) & m_token, other=0.0).to(tl.float32)
            b_x += tl.where(v < 0, -x, x)
    return b_x


@triton.jit
def load_folded(
    p_g, p_a, p_table_out, p_table_in, p_weights, o_bucket, stride_g, stride_a, width_out, width_in, m_token, i_residue,
    M: tl.constexpr, R: tl.constexpr, MANY_OUT: tl.constexpr, MANY_IN: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Both CountSketches of a block of tokens, their R chunks folded with the weights W_R^{q r} of residue r.

    Returns the folded sides as (re, im) pairs and the elementwise squares summed over chunks (for :func:`fft._scales`).
    """
    b_g_re = _sums(p_g, p_table_out, o_bucket, stride_g, width_out, m_token, MANY_OUT, HAS_MASK)
    b_a_re = _sums(p_a, p_table_in, o_bucket, stride_a, width_in, m_token, MANY_IN, HAS_MASK)
    b_g_sq, b_a_sq = b_g_re * b_g_re, b_a_re * b_a_re
    b_g_im, b_a_im = tl.zeros_like(b_g_re), tl.zeros_like(b_a_re)
    for q in tl.static_range(1, R):
        b_g = _sums(p_g, p_table_out + q * M * width_out, o_bucket, stride_g, width_out, m_token, MANY_OUT, HAS_MASK)
        b_a = _sums(p_a, p_table_in + q * M * width_in, o_bucket, stride_a, width_in, m_token, MANY_IN, HAS_MASK)
        w_re = tl.load(p_weights + (q * i_residue) % R)
        b_g_re += b_g * w_re
        b_a_re += b_a * w_re
        if R > 2:  # the square roots of one are real
            w_im = tl.load(p_weights + R + (q * i_residue) % R)
            b_g_im += b_g * w_im
            b_a_im += b_a * w_im
        b_g_sq += b_g * b_g
        b_a_sq += b_a * b_a
    return b_g_re, b_g_im, b_a_re, b_a_im, b_g_sq, b_a_sq
