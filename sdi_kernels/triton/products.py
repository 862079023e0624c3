"""Complex matrix products from real ones of fp16 numbers: what :mod:`sdi_kernels.triton.fft` transforms with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(p_const, N1: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr):
    """Where the parts of :func:`sdi_kernels.triton.transforms.constants` begin: matrices of both stages (of the
    first one set for each residue), twiddles of each residue, fold weights, W_R."""
    p_f2 = p_const + 4 * N1 * N1 * R
    p_twiddles = p_f2 + 6 * COLS * COLS
    p_fold = p_twiddles + 2 * N1 * COLS * R
    return p_const, p_f2, p_twiddles, p_fold, p_fold + 2 * N1 * COLS * R


@triton.jit
def matrix(p_f, N: tl.constexpr, K: tl.constexpr):
    """Matrix [N, N] number K from ``p_f`` on.

    It comes as fp32: of what is loaded as fp16, every product would read both operands from shared memory.
    """
    o = tl.arange(0, N)
    return tl.load(p_f + K * N * N + o[:, None] * N + o[None, :]).to(tl.float16)


@triton.jit
def left_half(p_f, N: tl.constexpr, K: tl.constexpr):
    """The left half, [N, N / 2], of :func:`matrix`."""
    o = tl.arange(0, N)
    return tl.load(p_f + K * N * N + o[:, None] * N + tl.arange(0, N // 2)[None, :]).to(tl.float16)


@triton.jit
def power_of_two(e):
    return (tl.minimum(tl.maximum(e + 127, 0), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves(b_x, HAS_LOW: tl.constexpr):
    """``b_x`` rounded to fp16, and (HAS_LOW) what that lacks."""
    b_high = b_x.to(tl.float16)
    b_rest = (b_x - b_high.to(tl.float32)).to(tl.float16) if HAS_LOW else b_high
    return b_high, b_rest


@triton.jit
def _left(b_f, b_low, b_high, b_rest, b_acc, HAS_LOW: tl.constexpr):
    """``F @ x`` added to ``b_acc``; with the low halves of both (HAS_LOW) in three products."""
    if HAS_LOW:
        b_acc = tl.dot(b_f, b_rest, tl.dot(b_low, b_high, b_acc))
    return tl.dot(b_f, b_high, b_acc)


@triton.jit
def _products(b_re, b_im, b_f_re, b_f_im, b_low_re, b_low_im, N1: tl.constexpr, HAS_LOW: tl.constexpr):
    """The four real products of ``F @ z``: Re F Re z, Re F Im z, Im F Re z, Im F Im z. Re z and Im z lie side by side,
    so that each matrix is read from shared memory but once for both."""
    K: tl.constexpr = b_re.shape[0]
    N2: tl.constexpr = b_re.shape[1]
    b_high, b_rest = _halves(tl.join(b_re, b_im).permute(0, 2, 1).reshape(K, 2 * N2), HAS_LOW)
    b_by_re = _left(b_f_re, b_low_re, b_high, b_rest, tl.zeros((N1, 2 * N2), tl.float32), HAS_LOW)
    b_by_im = _left(b_f_im, b_low_im, b_high, b_rest, tl.zeros((N1, 2 * N2), tl.float32), HAS_LOW)
    b_rr, b_ri = tl.split(b_by_re.reshape(N1, 2, N2).permute(0, 2, 1))
    b_ir, b_ii = tl.split(b_by_im.reshape(N1, 2, N2).permute(0, 2, 1))
    return b_rr, b_ri, b_ir, b_ii


@triton.jit
def left_dot(
    b_re, b_im, b_f_re, b_f_im, b_low_re, b_low_im, IS_CONJUGATE: tl.constexpr, HAS_LOW: tl.constexpr
):  # fmt: skip
    """``F @ z``, or of the conjugate of F."""
    b_rr, b_ri, b_ir, b_ii = _products(b_re, b_im, b_f_re, b_f_im, b_low_re, b_low_im, b_f_re.shape[0], HAS_LOW)
    if IS_CONJUGATE:
        b_re_out, b_im_out = b_rr + b_ii, b_ri - b_ir
    else:
        b_re_out, b_im_out = b_rr - b_ii, b_ri + b_ir
    return b_re_out, b_im_out


@triton.jit
def left_dot_short(
    b_re, b_im, b_re_2, b_f_re, b_f_im, b_low_re, b_low_im, b_f_re_2, b_f_im_2, b_low_re_2, b_low_im_2,
    HAS_LOW: tl.constexpr,
):  # fmt: skip
    """:func:`left_dot` where the lower half of Im z is zero. F comes as its left and its right half (``_2``)."""
    b_rr, b_ri, b_ir, b_ii = _products(b_re, b_im, b_f_re, b_f_im, b_low_re, b_low_im, b_f_re.shape[0], HAS_LOW)
    b_high, b_rest = _halves(b_re_2, HAS_LOW)
    b_rr = _left(b_f_re_2, b_low_re_2, b_high, b_rest, b_rr, HAS_LOW)
    b_ir = _left(b_f_im_2, b_low_im_2, b_high, b_rest, b_ir, HAS_LOW)
    return b_rr - b_ii, b_ri + b_ir


@triton.jit
def _right(b_x, b_f, b_low, b_acc, HAS_LOW: tl.constexpr):
    """``x @ F`` added to ``b_acc``; with the low halves of both (HAS_LOW) in three products."""
    b_high, b_rest = _halves(b_x, HAS_LOW)
    if HAS_LOW:
        b_acc = tl.dot(b_rest, b_f, tl.dot(b_high, b_low, b_acc))
    return tl.dot(b_high, b_f, b_acc)


@triton.jit
def right_dot(b_re, b_im, b_f0, b_f1, b_f2, b_low0, b_low1, b_low2, HAS_LOW: tl.constexpr):
    """``z @ F``: in three real products (HAS_LOW), F given as (Re, -(Re + Im), Im - Re), which take least of tensor
    cores and shared memory; or in two twice as wide, F given as (Re, Im, -Im), which take fewer instructions.

    Swapping the last two gives the product with the conjugate of F.
    """
    if HAS_LOW:
        b_sum = _right(b_re + b_im, b_f0, b_low0, tl.zeros(b_re.shape, tl.float32), HAS_LOW)
        b_re_out = _right(b_im, b_f1, b_low1, b_sum, HAS_LOW)
        b_im_out = _right(b_re, b_f2, b_low2, b_sum, HAS_LOW)
    else:
        N1: tl.constexpr = b_re.shape[0]
        N2: tl.constexpr = b_re.shape[1]
        b_by_re = tl.join(b_f0, b_f1).permute(0, 2, 1).reshape(N2, 2 * N2)
        b_by_im = tl.join(b_f2, b_f0).permute(0, 2, 1).reshape(N2, 2 * N2)
        b_acc = tl.dot(b_re.to(tl.float16), b_by_re, tl.zeros((N1, 2 * N2), tl.float32))
        b_acc = tl.dot(b_im.to(tl.float16), b_by_im, b_acc)
        b_re_out, b_im_out = tl.split(b_acc.reshape(N1, 2, N2).permute(0, 2, 1))
    return b_re_out, b_im_out
