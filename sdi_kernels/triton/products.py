"""Complex matrix products from real ones of fp16 numbers: what :mod:`sdi_kernels.triton.fft` transforms with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(p_const, N1: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr):
    """Where the parts of :func:`sdi_kernels.triton.transforms.constants` begin: matrices of both stages, twiddles,
    fold weights, W_R."""
    p_f2 = p_const + 6 * N1 * N1
    p_twiddles = p_f2 + 6 * COLS * COLS
    p_fold = p_twiddles + 2 * N1 * COLS
    return p_const, p_f2, p_twiddles, p_fold, p_fold + 2 * N1 * COLS * R


@triton.jit
def matrices(p_f, N: tl.constexpr):
    """The three matrices [N, N] that stand for a DFT, see :func:`complex_dot`.

    They come as fp32: of what is loaded as fp16, every product would read both operands from shared memory.
    """
    o = tl.arange(0, N)
    p_f += o[:, None] * N + o[None, :]
    b_f0, b_f1, b_f2 = tl.load(p_f), tl.load(p_f + N * N), tl.load(p_f + 2 * N * N)
    return b_f0.to(tl.float16), b_f1.to(tl.float16), b_f2.to(tl.float16)


@triton.jit
def power_of_two(e):
    return (tl.minimum(tl.maximum(e + 127, 0), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _dot(b_f, b_low, b_x, b_acc, IS_LEFT: tl.constexpr, HAS_LOW: tl.constexpr):
    """``F @ x`` (IS_LEFT) or ``x @ F`` added to ``b_acc``; with the low halves of both (HAS_LOW) in three products."""
    b_high = b_x.to(tl.float16)
    if HAS_LOW:
        b_rest = (b_x - b_high.to(tl.float32)).to(tl.float16)
        if IS_LEFT:
            b_acc = tl.dot(b_f, b_rest, tl.dot(b_low, b_high, b_acc))
        else:
            b_acc = tl.dot(b_rest, b_f, tl.dot(b_high, b_low, b_acc))
    return tl.dot(b_f, b_high, b_acc) if IS_LEFT else tl.dot(b_high, b_f, b_acc)


@triton.jit
def complex_dot(
    b_re, b_im, b_f0, b_f1, b_f2, b_low0, b_low1, b_low2, IS_LEFT: tl.constexpr, HAS_LOW: tl.constexpr
):  # fmt: skip
    """``F @ z`` (IS_LEFT) or ``z @ F`` in three real products; F is given as (Re, -(Re + Im), Im - Re).

    Swapping the last two gives the product with the conjugate of F.
    """
    b_sum = _dot(b_f0, b_low0, b_re + b_im, tl.zeros(b_re.shape, tl.float32), IS_LEFT, HAS_LOW)
    b_re_out = _dot(b_f1, b_low1, b_im, b_sum, IS_LEFT, HAS_LOW)
    b_im_out = _dot(b_f2, b_low2, b_re, b_sum, IS_LEFT, HAS_LOW)
    return b_re_out, b_im_out
