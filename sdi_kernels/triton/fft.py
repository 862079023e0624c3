"""The ``fft`` route: TensorSketch by a transform on tensor cores, multiply-accumulated in the frequency domain.

Per token, both CountSketches become one complex sequence ``z = CS_out(delta) + i CS_in(a)`` of length m, gathered
through the inverse tables. Its DFT runs as two small matrix products with a twiddle between them (m = N1 x N2); the
squares add up over tokens in registers. At the end ``TS = Im(ifft(sum_l fft(z_l)^2)) / 2``.

A transform too large for the registers is split by frequency residue: program r of R owns the m/R frequencies
``k = R k' + r``. It folds the R chunks of z with the weights ``W_R^{q r}``, twiddles by ``W_m^{n' r}`` and transforms
m/R points. A second, small launch sums token splits and inverts the transform, once per row. (Doing that at the end
of the first kernel saves the launch but costs registers that the token loop needs: it spilled.) No atomics anywhere:
the result is the same from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sdi_kernels.triton import common
from sdi_kernels.triton.rounding import operand
from sdi_kernels.triton.transforms import configs, constants, finish_precision
from sdi_kernels.triton.uses import PAIR, Tensors, pair, slot, work

MAX_UNROLL = 4
"""Sources of a bucket that are loaded together; fuller buckets take several rounds."""


@triton.jit
def _places(p_const, N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr):
    """Where the parts of :func:`constants` begin: matrices of both stages, twiddles, fold weights, W_R."""
    p_f2 = p_const + 3 * N1 * N1
    p_twiddles = p_f2 + 3 * N2 * N2
    p_fold = p_twiddles + 2 * N1 * N2
    return p_const, p_f2, p_twiddles, p_fold, p_fold + 2 * N1 * N2 * R


@triton.jit
def _matrix(p_f, N: tl.constexpr):
    """The three matrices [N, N] that stand for a DFT, see :func:`_complex_dot`."""
    o = tl.arange(0, N)
    p_f += o[:, None] * N + o[None, :]
    return tl.load(p_f), tl.load(p_f + N * N), tl.load(p_f + 2 * N * N)


@triton.jit
def _gather(p_x, p_table, o_bucket, stride, width, m_token, UNROLL: tl.constexpr):
    """CountSketch of a block: value of each bucket in ``o_bucket`` = signed sum of its sources, in fp32."""
    if UNROLL == 1:
        v = tl.load(p_table + o_bucket)
        b_x = tl.load(p_x + (tl.abs(v) - 1) * stride, mask=(v != 0) & m_token, other=0.0).to(tl.float32)
        b_x = tl.where(v < 0, -b_x, b_x)
    else:
        b_x = tl.zeros(o_bucket.shape, tl.float32)
        for j0 in range(0, width, UNROLL):
            for u in tl.static_range(UNROLL):
                v = tl.load(p_table + o_bucket * width + j0 + u, mask=j0 + u < width, other=0)
                x = tl.load(p_x + (tl.abs(v) - 1) * stride, mask=(v != 0) & m_token, other=0.0).to(tl.float32)
                b_x += tl.where(v < 0, -x, x)
    return b_x


@triton.jit
def _load_folded(
    p_g, p_a, p_table_out, p_table_in, p_weights, o_bucket, stride_g, stride_a, width_out, width_in, m_token, i_residue,
    M: tl.constexpr, R: tl.constexpr, UNROLL_OUT: tl.constexpr, UNROLL_IN: tl.constexpr,
):  # fmt: skip
    """Both CountSketches of a block of tokens, their R chunks folded with the weights W_R^{q r} of residue r.

    Returns the folded sides as (re, im) pairs and the elementwise squares summed over chunks (for :func:`_balance`).
    """
    b_g_re = _gather(p_g, p_table_out, o_bucket, stride_g, width_out, m_token, UNROLL_OUT)
    b_a_re = _gather(p_a, p_table_in, o_bucket, stride_a, width_in, m_token, UNROLL_IN)
    b_g_sq, b_a_sq = b_g_re * b_g_re, b_a_re * b_a_re
    b_g_im, b_a_im = tl.zeros_like(b_g_re), tl.zeros_like(b_a_re)
    for q in tl.static_range(1, R):
        b_g = _gather(p_g, p_table_out, o_bucket + q * M, stride_g, width_out, m_token, UNROLL_OUT)
        b_a = _gather(p_a, p_table_in, o_bucket + q * M, stride_a, width_in, m_token, UNROLL_IN)
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


@triton.jit
def _add_pairs(a_0, a_1, b_0, b_1):
    return a_0 + b_0, a_1 + b_1


@triton.jit
def _balance(b_g_sq, b_a_sq, N1: tl.constexpr, N2: tl.constexpr, BLOCK_T: tl.constexpr):
    """Powers of two (s, 1/s), one pair per token, that bring ``s delta`` and ``a / s`` to about the same norm.

    The product of the two spectra is what is wanted, but z^2 also holds the difference of their squares. Output
    gradients are often a million times smaller than activations; without this their bits would drown in it.
    Exact, since a power of two only moves exponents; the same in every residue program, since it depends on all of m.
    """
    b_g_sq = b_g_sq.reshape(N1, BLOCK_T, N2).permute(1, 0, 2).reshape(BLOCK_T, N1 * N2)
    b_a_sq = b_a_sq.reshape(N1, BLOCK_T, N2).permute(1, 0, 2).reshape(BLOCK_T, N1 * N2)
    b_g_sum, b_a_sum = tl.reduce((b_g_sq, b_a_sq), 1, _add_pairs)  # one reduction for both: one barrier
    e_g = b_g_sum.to(tl.int32, bitcast=True) >> 23
    e_a = b_a_sum.to(tl.int32, bitcast=True) >> 23
    e = (e_a - e_g + 2) >> 2
    b_up = ((127 + e) << 23).to(tl.float32, bitcast=True)
    b_down = ((127 - e) << 23).to(tl.float32, bitcast=True)
    b_up = tl.broadcast_to(b_up[:, None], (BLOCK_T, N2)).reshape(BLOCK_T * N2)[None, :]
    b_down = tl.broadcast_to(b_down[:, None], (BLOCK_T, N2)).reshape(BLOCK_T * N2)[None, :]
    return b_up, b_down


@triton.jit
def _complex_dot(b_a_re, b_a_im, b_f0, b_f1, b_f2, IS_LEFT: tl.constexpr, PRECISION: tl.constexpr):
    """``F @ a`` (IS_LEFT) or ``a @ F`` in three real products; F is given as (Re, -(Re + Im), Im - Re).

    Swapping the last two gives the product with the conjugate of F.
    """
    b_sum = operand(b_a_re + b_a_im, PRECISION)
    b_a_re = operand(b_a_re, PRECISION)
    b_a_im = operand(b_a_im, PRECISION)
    if IS_LEFT:
        b_sum = tl.dot(b_f0, b_sum, input_precision=PRECISION)
        b_re = tl.dot(b_f1, b_a_im, b_sum, input_precision=PRECISION)
        b_im = tl.dot(b_f2, b_a_re, b_sum, input_precision=PRECISION)
    else:
        b_sum = tl.dot(b_sum, b_f0, input_precision=PRECISION)
        b_re = tl.dot(b_a_im, b_f1, b_sum, input_precision=PRECISION)
        b_im = tl.dot(b_a_re, b_f2, b_sum, input_precision=PRECISION)
    return b_re, b_im


@triton.jit
def _inverse(b_re, b_im, p_const, N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr):
    """Unscaled inverse DFT of a spectrum [k1, k2] (k = k1 + N1 k2), as [p1, p2] (p = N2 p1 + p2)."""
    o_pos = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    p_f1, p_f2, p_tw, _, _ = _places(p_const, N1, N2, 1)
    b_f0, b_f1, b_f2 = _matrix(p_f2, N2)
    b_re, b_im = _complex_dot(b_re, b_im, b_f0, b_f2, b_f1, False, PRECISION)
    b_tr, b_ti = tl.load(p_tw + o_pos), tl.load(p_tw + N1 * N2 + o_pos)
    b_vr = b_re * b_tr + b_im * b_ti
    b_vi = b_im * b_tr - b_re * b_ti
    b_f0, b_f1, b_f2 = _matrix(p_f1, N1)
    return _complex_dot(b_vr, b_vi, b_f0, b_f2, b_f1, True, PRECISION)


# Counts of rows and tokens vary from call to call and gain nothing from a program of their own.
@triton.jit(do_not_specialize=["i_begin", "rows", "tokens", "splits", "tokens_per_split", "width_in", "width_out"])
def fft_sketch_kernel(
    p_work, p_a, p_g, p_table, p_table_in, p_table_out, p_const, i_begin, rows, tokens, splits,
    tokens_per_split, width_in, width_out, stride_ar, stride_at, stride_ad, stride_gr, stride_gt, stride_gd,
    N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
    UNROLL_IN: tl.constexpr, UNROLL_OUT: tl.constexpr, IS_WIDE: tl.constexpr, PREFETCH: tl.constexpr,
    PRECISION: tl.constexpr, IS_LIST: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sum over one row's tokens (or one split of them) of the squared spectra, for one frequency residue.

    Grid: (some of slots * rows, from ``i_begin`` on, pairs * splits, R). Each program writes its [2, N1, N2] of the
    workspace.
    """
    M: tl.constexpr = N1 * N2
    i_work = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    i_residue = tl.program_id(2)
    i_row = i_begin + i_work
    i_split = i_part % splits
    if IS_LIST:
        p_pair, pairs, slot_rows, _ = slot(p_table, i_row // rows)
        i_row %= rows
        if (i_row >= slot_rows) | (i_part // splits >= pairs):
            return
        p_pair += (i_part // splits) * PAIR
        p_a, p_g, stride_at, stride_gt, tokens, _ = pair(p_pair, p_a, p_g, i_row, IS_ALIGNED)
    else:
        p_a += i_row * stride_ar
        p_g += i_row * stride_gr

    o_1 = tl.arange(0, N1)
    o_2 = tl.arange(0, N2)
    o_col = tl.arange(0, BLOCK_T * N2)
    # A block is [n1, (token, n2)]: tokens lie side by side, so that one product transforms all of them.
    o_bucket = o_1[:, None] * N2 + (o_col % N2)[None, :]
    o_token = (o_col // N2)[None, :]
    if IS_WIDE:
        stride_ad = tl.cast(stride_ad, tl.int64)
        stride_gd = tl.cast(stride_gd, tl.int64)

    p_f1, p_f2, p_tw, p_fold, p_weights = _places(p_const, N1, N2, R)
    p_fold += 2 * M * i_residue + o_bucket
    b_f10, b_f11, b_f12 = _matrix(p_f1, N1)
    b_f20, b_f21, b_f22 = _matrix(p_f2, N2)
    b_tr, b_ti = tl.load(p_tw + o_bucket), tl.load(p_tw + M + o_bucket)

    i_first = i_split * tokens_per_split
    i_last = tl.minimum(i_first + tokens_per_split, tokens)
    o_at = (i_first + o_token).to(tl.int64)
    p_ax = p_a + o_at * stride_at
    p_gx = p_g + o_at * stride_gt
    step_a = BLOCK_T * tl.cast(stride_at, tl.int64)
    step_g = BLOCK_T * tl.cast(stride_gt, tl.int64)
    b_acc_re = tl.zeros((BLOCK_T * N1, N2), tl.float32)
    b_acc_im = tl.zeros((BLOCK_T * N1, N2), tl.float32)
    if PREFETCH:  # the next token's values are loaded while this one is transformed
        b_g_re, b_g_im, b_a_re, b_a_im, b_g_sq, b_a_sq = _load_folded(
            p_gx, p_ax, p_table_out, p_table_in, p_weights, o_bucket, stride_gd, stride_ad, width_out, width_in,
            i_first + o_token < i_last, i_residue, M, R, UNROLL_OUT, UNROLL_IN,
        )  # fmt: skip
    for i_t in range(i_first, i_last, BLOCK_T):
        if PREFETCH:
            c_g_re, c_g_im, c_a_re, c_a_im, c_g_sq, c_a_sq = b_g_re, b_g_im, b_a_re, b_a_im, b_g_sq, b_a_sq
            p_ax += step_a
            p_gx += step_g
            b_g_re, b_g_im, b_a_re, b_a_im, b_g_sq, b_a_sq = _load_folded(
                p_gx, p_ax, p_table_out, p_table_in, p_weights, o_bucket, stride_gd, stride_ad, width_out, width_in,
                i_t + BLOCK_T + o_token < i_last, i_residue, M, R, UNROLL_OUT, UNROLL_IN,
            )  # fmt: skip
        else:
            c_g_re, c_g_im, c_a_re, c_a_im, c_g_sq, c_a_sq = _load_folded(
                p_gx, p_ax, p_table_out, p_table_in, p_weights, o_bucket, stride_gd, stride_ad, width_out, width_in,
                i_t + o_token < i_last, i_residue, M, R, UNROLL_OUT, UNROLL_IN,
            )  # fmt: skip
            p_ax += step_a
            p_gx += step_g
        b_up, b_down = _balance(c_g_sq, c_a_sq, N1, N2, BLOCK_T)
        if R > 1:
            b_zr = c_g_re * b_up
            b_zi = c_a_re * b_down
            if R > 2:
                b_zr -= c_a_im * b_down
                b_zi += c_g_im * b_up
            b_wr, b_wi = tl.load(p_fold), tl.load(p_fold + M)
            b_yr = b_zr * b_wr - b_zi * b_wi
            b_yi = b_zr * b_wi + b_zi * b_wr
        else:
            b_yr, b_yi = c_g_re * b_up, c_a_re * b_down
        b_ur, b_ui = _complex_dot(b_yr, b_yi, b_f10, b_f11, b_f12, True, PRECISION)
        b_vr = b_ur * b_tr - b_ui * b_ti
        b_vi = b_ur * b_ti + b_ui * b_tr
        if BLOCK_T > 1:  # [k1, (token, n2)] -> [(token, k1), n2]
            b_vr = b_vr.reshape(N1, BLOCK_T, N2).permute(1, 0, 2).reshape(BLOCK_T * N1, N2)
            b_vi = b_vi.reshape(N1, BLOCK_T, N2).permute(1, 0, 2).reshape(BLOCK_T * N1, N2)
        b_zr, b_zi = _complex_dot(b_vr, b_vi, b_f20, b_f21, b_f22, False, PRECISION)
        b_acc_re += b_zr * b_zr - b_zi * b_zi
        b_acc_im += 2.0 * b_zr * b_zi

    if BLOCK_T > 1:
        b_acc_re = tl.sum(b_acc_re.reshape(BLOCK_T, N1, N2), 0)
        b_acc_im = tl.sum(b_acc_im.reshape(BLOCK_T, N1, N2), 0)
    o_freq = o_1[:, None] * N2 + o_2[None, :]
    p_part = p_work + ((i_work * tl.num_programs(1) + i_part) * R + i_residue) * (2 * M) + o_freq
    tl.store(p_part, b_acc_re)
    tl.store(p_part + M, b_acc_im)


@triton.jit(do_not_specialize=["i_begin", "rows", "splits", "parts"])
def fft_finish_kernel(
    p_out, p_work, p_table, p_const, i_begin, rows, splits, parts, stride_or, stride_om,
    N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, IS_LIST: tl.constexpr,
):  # fmt: skip
    """Sum the spectra of a row's pairs and splits, invert, add positions [q M, (q + 1) M) to ``p_out``.

    Grid: (some of slots * rows, from ``i_begin`` on, R).
    """
    M: tl.constexpr = N1 * N2
    i_work = tl.program_id(0).to(tl.int64)
    i_row = i_begin + i_work
    count = parts
    if IS_LIST:
        _, pairs, slot_rows, offset = slot(p_table, i_row // rows)
        i_row %= rows
        if i_row >= slot_rows:
            return
        p_out += offset
        count = pairs * splits
    i_chunk = tl.program_id(1)
    o_pos = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    _, _, _, p_fold, p_weights = _places(p_const, N1, N2, R)
    p_fold += o_pos

    b_y = tl.zeros((N1, N2), tl.float32)
    for i_residue in range(R):
        b_re = tl.zeros((N1, N2), tl.float32)
        b_im = tl.zeros((N1, N2), tl.float32)
        for i_part in range(count):
            p_part = p_work + ((i_work * parts + i_part) * R + i_residue) * (2 * M) + o_pos
            b_re += tl.load(p_part)
            b_im += tl.load(p_part + M)
        b_xr, b_xi = _inverse(b_re, b_im, p_const, N1, N2, PRECISION)
        # Conjugates of the forward weights: W_m^{-r p'} W_R^{-r q}; only the imaginary part is wanted.
        b_wr = tl.load(p_fold + 2 * M * i_residue)
        b_wi = tl.load(p_fold + 2 * M * i_residue + M)
        w_re = tl.load(p_weights + (i_chunk * i_residue) % R)
        w_im = tl.load(p_weights + R + (i_chunk * i_residue) % R)
        b_y += b_xi * (b_wr * w_re - b_wi * w_im) - b_xr * (b_wr * w_im + b_wi * w_re)
    p_y = p_out + i_row * stride_or + (i_chunk * M + o_pos).to(tl.int64) * stride_om
    tl.store(p_y, tl.load(p_y) + b_y * (0.5 / (M * R)))


def _unroll(width: int) -> int:
    return min(MAX_UNROLL, 1 << (width - 1).bit_length())


def linear_fft(
    out: Tensor,
    activations: Tensors,
    grad_outputs: Tensors,
    tables: Sequence[Tensor],
    m: int,
    *,
    steps: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    workspace: int = 64 << 20,
) -> None:
    """Add the TensorSketch of each row's weight gradient to ``out``, by two launches.

    Args:
        out: (rows, m) float32, any strides; with lists (rows, steps, m).
        activations: (rows, tokens, d_in); grad_outputs: (rows, tokens, d_out): float32, bfloat16 or float16, strided.
            Or lists of them.
        tables: the six tables of :meth:`TensorSketch.tables`.
        m: a key of :func:`configs`.
        steps, rows: for lists, where each pair goes, see :func:`sdi_kernels.triton.uses.work`.
        workspace: bytes of temporary memory, 8 a bucket of each row and part (a pair's tokens, or a split of them);
            more rows take two launches more.
    """
    found = work(out, activations, grad_outputs, steps, rows)
    if found is None:
        return
    a, g = found.activations, found.grad_outputs
    config = configs(out.device)[m]
    table_out, table_in = tables[2], tables[5]
    precision = common.dot_precision(a, g)
    const = constants(config, out.device, precision)
    inverse = finish_precision(precision)
    inverse_const = constants(config, out.device, inverse)
    total = found.slots * found.rows
    programs = total * found.pairs * config.residues
    splits, per_split = common.parts(programs, found.longest, config.tokens, 16, out.device)
    parts = found.pairs * splits
    chunk = min(total, max(1, workspace // (8 * m * parts)))
    spectra = out.new_empty(chunk * parts * 2 * m)
    shape: dict[str, Any] = {
        "N1": config.n1, "N2": config.n2, "R": config.residues, "num_warps": config.num_warps, "num_stages": 1,
    }  # fmt: skip
    for begin in range(0, total, chunk):
        count = min(chunk, total - begin)
        fft_sketch_kernel[(count, parts, config.residues)](
            spectra, a, g, found.table, table_in, table_out, const, begin, found.rows, found.longest, splits,
            per_split, table_in.shape[1], table_out.shape[1], *found.strides,
            BLOCK_T=config.tokens, UNROLL_IN=_unroll(table_in.shape[1]), UNROLL_OUT=_unroll(table_out.shape[1]),
            IS_WIDE=common.wide(a) or common.wide(g), PREFETCH=config.prefetch, PRECISION=precision,
            **shape, **found.constants,
        )  # fmt: skip
        fft_finish_kernel[(count, config.residues)](
            found.out, spectra, found.table, inverse_const, begin, found.rows, splits, parts, *found.out.stride(),
            PRECISION=inverse, IS_LIST=found.constants["IS_LIST"], **shape,
        )  # fmt: skip
