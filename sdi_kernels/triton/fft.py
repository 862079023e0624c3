"""The ``fft`` route: TensorSketch by a transform on tensor cores, multiply-accumulated in the frequency domain.

Per token, both CountSketches become one complex sequence ``z = CS_out(delta) + i CS_in(a)`` of length m, gathered
through the inverse tables. Its DFT runs as two small matrix products with a twiddle between them (m = N1 x N2); the
squares add up over tokens in registers. At the end ``TS = Im(ifft(sum_l fft(z_l)^2)) / 2``.

A program is one warpgroup with a block [64, 32], or two with [128, 32]: ``F1 z`` puts its rows where ``(...) F2`` reads
them as an operand, so that nothing but z goes through shared memory. Small transforms lie side by side, several tokens
to a block; F2 is then block diagonal. Operands are fp16: a power of two per token brings both sides to a norm of 45 to
91, and what has been taken out of a token's product comes back as it is added up. fp16 keeps as many bits as tf32, at
twice the rate; for fp32 inputs operands are sums of two fp16 numbers, and products three of theirs.

A transform that no block holds is split by frequency residue: program r of R owns the m/R frequencies
``k = R k' + r``. It folds the R chunks of z with the weights ``W_R^{q r}``, twiddles by ``W_m^{n' r}`` and transforms
m/R points. A second, small launch sums token splits and inverts the transform, once per row. (Doing that at the end
of the first kernel saves the launch but costs registers that the token loop needs: it spilled.) No atomics anywhere:
the result is the same from run to run.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sdi_kernels.calls import LinearCall, LinearStepsCall
from sdi_kernels.triton import common
from sdi_kernels.triton.gather import (
    gather,
    gather_row,
    gather_rows,
    load_folded,
    load_row,
    row_sources,
    sources,
)
from sdi_kernels.triton.products import complex_dot, matrices, places, power_of_two
from sdi_kernels.triton.transforms import COLUMNS, FINISH, config_of, constants, rows_of
from sdi_kernels.triton.uses import PAIR, pair, slot, work

SMALLEST_PART = 4
"""Tokens that a program keeps at least: what a part costs to finish is about what one of its tokens costs."""

AHEAD = 4
"""Spectra of parts that the finishing launch loads together."""


@triton.jit
def _add_pairs(a_0, a_1, b_0, b_1):
    return a_0 + b_0, a_1 + b_1


@triton.jit
def _columns(x, N2: tl.constexpr, BLOCK_T: tl.constexpr):
    """A number of each token for all of its columns."""
    return tl.broadcast_to(x[:, None], (BLOCK_T, N2)).reshape(BLOCK_T * N2)[None, :]


@triton.jit
def _scales(b_g_sq, b_a_sq, N1: tl.constexpr, N2: tl.constexpr, BLOCK_T: tl.constexpr):
    """Powers of two, three per token: for delta, for a (norms of 45 to 91 after it), and what undoes both in z^2.

    The product of the two spectra is what is wanted, but z^2 also holds the difference of their squares: output
    gradients are often a million times smaller than activations, and their bits would drown. Nor does fp16 hold
    numbers below 2^-24 or, after two stages, norms beyond 2^10. Exact, since a power of two only moves exponents; the
    same in every residue program, since it depends on all of m.
    """
    if BLOCK_T == 1:
        b_g_sq, b_a_sq = b_g_sq.reshape(N1 * N2), b_a_sq.reshape(N1 * N2)
        b_g_sum, b_a_sum = tl.reduce((b_g_sq, b_a_sq), 0, _add_pairs)  # one reduction for both: one barrier
    else:
        b_g_sq = b_g_sq.reshape(N1, BLOCK_T, N2).permute(1, 0, 2).reshape(BLOCK_T, N1 * N2)
        b_a_sq = b_a_sq.reshape(N1, BLOCK_T, N2).permute(1, 0, 2).reshape(BLOCK_T, N1 * N2)
        b_g_sum, b_a_sum = tl.reduce((b_g_sq, b_a_sq), 1, _add_pairs)
    e_g = 6 - (((b_g_sum.to(tl.int32, bitcast=True) >> 23) - 126) >> 1)
    e_a = 6 - (((b_a_sum.to(tl.int32, bitcast=True) >> 23) - 126) >> 1)
    b_g_up, b_a_up, b_down = power_of_two(e_g), power_of_two(e_a), power_of_two(-e_g - e_a)
    if BLOCK_T > 1:
        b_g_up, b_a_up = _columns(b_g_up, N2, BLOCK_T), _columns(b_a_up, N2, BLOCK_T)
        b_down = _columns(b_down, N2, BLOCK_T)
    return b_g_up, b_a_up, b_down


# Counts of rows and tokens vary from call to call and gain nothing from a program of their own.
@triton.jit(do_not_specialize=["i_begin", "rows", "tokens", "splits", "tokens_per_split", "width_in", "width_out"])
def fft_sketch_kernel(
    p_work, p_a, p_g, p_table, p_table_in, p_table_out, p_const, i_begin, rows, tokens, splits,
    tokens_per_split, width_in, width_out, d_in, d_out,
    stride_ar, stride_at, stride_ad, stride_gr, stride_gt, stride_gd,
    N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
    MANY_IN: tl.constexpr, MANY_OUT: tl.constexpr, IS_WIDE: tl.constexpr, PREFETCH: tl.constexpr,
    HAS_LOW: tl.constexpr, ROW_IN: tl.constexpr, ROW_OUT: tl.constexpr, IS_LIST: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sum over one row's tokens (or one split of them) of the squared spectra, for one frequency residue.

    Grid: (some of slots * rows, from ``i_begin`` on, pairs * splits, R). Each program writes its m/R frequencies, in
    order, real parts before imaginary ones, into the workspace.
    """
    M: tl.constexpr = N1 * N2
    COLS: tl.constexpr = BLOCK_T * N2
    HAS_MASK: tl.constexpr = BLOCK_T > 1
    IS_PLAIN: tl.constexpr = R == 1 and not MANY_IN and not MANY_OUT
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
    o_col = tl.arange(0, COLS)
    # A block is [n1, (token, n2)]: tokens lie side by side, so that one product transforms all of them.
    o_place = o_1[:, None] * COLS + o_col[None, :]
    o_bucket = o_1[:, None] * N2 + (o_col % N2)[None, :]
    o_token = (o_col // N2)[None, :]
    if IS_WIDE:
        stride_ad = tl.cast(stride_ad, tl.int64)
        stride_gd = tl.cast(stride_gd, tl.int64)

    p_f1, p_f2, p_tw, p_fold, p_weights = places(p_const, N1, COLS, R)
    p_fold += 2 * N1 * COLS * i_residue + o_place
    b_f10, b_f11, b_f12 = matrices(p_f1, N1)
    b_f20, b_f21, b_f22 = matrices(p_f2, COLS)
    b_low10, b_low11, b_low12 = b_f10, b_f11, b_f12
    b_low20, b_low21, b_low22 = b_f20, b_f21, b_f22
    if HAS_LOW:
        b_low10, b_low11, b_low12 = matrices(p_f1 + 3 * N1 * N1, N1)
        b_low20, b_low21, b_low22 = matrices(p_f2 + 3 * COLS * COLS, COLS)
    b_tr, b_ti = tl.load(p_tw + o_place), tl.load(p_tw + N1 * COLS + o_place)

    i_first = i_split * tokens_per_split
    i_last = tl.minimum(i_first + tokens_per_split, tokens)
    o_at = (i_first + o_token).to(tl.int64)
    p_ax = p_a + o_at * stride_at
    p_gx = p_g + o_at * stride_gt
    step_a = BLOCK_T * tl.cast(stride_at, tl.int64)
    step_g = BLOCK_T * tl.cast(stride_gt, tl.int64)
    b_acc_re = tl.zeros((N1, COLS), tl.float32)
    b_acc_im = tl.zeros((N1, COLS), tl.float32)
    if ROW_IN > 0:
        if not MANY_OUT:  # tables stay in registers
            o_g, b_g_sign = row_sources(p_table_out, M)
        if not MANY_IN:
            o_a, b_a_sign = row_sources(p_table_in, M)
        p_gx = p_g + i_first * tl.cast(stride_gt, tl.int64)
        p_ax = p_a + i_first * tl.cast(stride_at, tl.int64)
        if PREFETCH:
            b_g = load_row(p_gx, stride_gd, d_out, i_first < i_last, ROW_OUT)
            b_a = load_row(p_ax, stride_ad, d_in, i_first < i_last, ROW_IN)
    elif IS_PLAIN:
        o_g, b_g_sign = sources(p_table_out, o_bucket, False)
        o_a, b_a_sign = sources(p_table_in, o_bucket, False)
        if PREFETCH:  # the next token's values are loaded while this one is transformed
            m_token = i_first + o_token < i_last
            b_g = gather(p_gx, o_g, b_g_sign, stride_gd, m_token, True)
            b_a = gather(p_ax, o_a, b_a_sign, stride_ad, m_token, True)
    for i_t in range(i_first, i_last, BLOCK_T):
        m_token = i_t + o_token < i_last
        if ROW_IN > 0:
            if PREFETCH:
                c_g, c_a = b_g, b_a
                p_ax += step_a
                p_gx += step_g
                b_g = load_row(p_gx, stride_gd, d_out, i_t + 1 < i_last, ROW_OUT)
                b_a = load_row(p_ax, stride_ad, d_in, i_t + 1 < i_last, ROW_IN)
            else:
                c_g = load_row(p_gx, stride_gd, d_out, True, ROW_OUT)
                c_a = load_row(p_ax, stride_ad, d_in, True, ROW_IN)
                p_ax += step_a
                p_gx += step_g
            if not MANY_OUT:
                c_g = gather_row(c_g, o_g, b_g_sign, N1, N2)
            else:
                c_g = gather_rows(c_g, p_table_out, width_out, N1, N2)
            if not MANY_IN:
                c_a = gather_row(c_a, o_a, b_a_sign, N1, N2)
            else:
                c_a = gather_rows(c_a, p_table_in, width_in, N1, N2)
            b_g_up, b_a_up, b_down = _scales(c_g * c_g, c_a * c_a, N1, N2, BLOCK_T)
            b_zr, b_zi = c_g * b_g_up, c_a * b_a_up
        elif IS_PLAIN:
            if PREFETCH:
                c_g, c_a = b_g, b_a
                p_ax += step_a
                p_gx += step_g
                m_token = i_t + BLOCK_T + o_token < i_last
                b_g = gather(p_gx, o_g, b_g_sign, stride_gd, m_token, True)
                b_a = gather(p_ax, o_a, b_a_sign, stride_ad, m_token, True)
            else:
                c_g = gather(p_gx, o_g, b_g_sign, stride_gd, m_token, HAS_MASK)
                c_a = gather(p_ax, o_a, b_a_sign, stride_ad, m_token, HAS_MASK)
                p_ax += step_a
                p_gx += step_g
            b_g_up, b_a_up, b_down = _scales(c_g * c_g, c_a * c_a, N1, N2, BLOCK_T)
            b_zr, b_zi = c_g * b_g_up, c_a * b_a_up
        else:
            c_g_re, c_g_im, c_a_re, c_a_im, c_g_sq, c_a_sq = load_folded(
                p_gx, p_ax, p_table_out, p_table_in, p_weights, o_bucket, stride_gd, stride_ad, width_out, width_in,
                m_token, i_residue, M, R, MANY_OUT, MANY_IN, HAS_MASK,
            )  # fmt: skip
            p_ax += step_a
            p_gx += step_g
            b_g_up, b_a_up, b_down = _scales(c_g_sq, c_a_sq, N1, N2, BLOCK_T)
            b_zr, b_zi = c_g_re * b_g_up, c_a_re * b_a_up
            if R > 2:
                b_zr -= c_a_im * b_a_up
                b_zi += c_g_im * b_g_up
            if R > 1:
                b_wr, b_wi = tl.load(p_fold, volatile=True), tl.load(p_fold + N1 * COLS, volatile=True)
                b_yr = b_zr * b_wr - b_zi * b_wi
                b_zi = b_zr * b_wi + b_zi * b_wr
                b_zr = b_yr
        b_ur, b_ui = complex_dot(
            b_zr, b_zi, b_f10, b_f11, b_f12, b_low10, b_low11, b_low12, True, HAS_LOW
        )  # fmt: skip
        b_vr = b_ur * b_tr - b_ui * b_ti
        b_vi = b_ur * b_ti + b_ui * b_tr
        b_sr, b_si = complex_dot(
            b_vr, b_vi, b_f20, b_f21, b_f22, b_low20, b_low21, b_low22, False, HAS_LOW
        )  # fmt: skip
        b_acc_re += (b_sr * b_sr - b_si * b_si) * b_down
        b_acc_im += (b_sr * b_si) * b_down

    if BLOCK_T > 1:
        b_acc_re = tl.sum(b_acc_re.reshape(N1, BLOCK_T, N2), 1)
        b_acc_im = tl.sum(b_acc_im.reshape(N1, BLOCK_T, N2), 1)
    o_freq = o_1[:, None] + N1 * tl.arange(0, N2)[None, :]
    p_part = p_work + ((i_work * tl.num_programs(1) + i_part) * R + i_residue) * (2 * M) + o_freq
    tl.store(p_part, b_acc_re)
    tl.store(p_part + M, 2.0 * b_acc_im)


@triton.jit
def _inverse(b_re, b_im, p_const, o_place, N1: tl.constexpr, COLS: tl.constexpr):
    """Unscaled inverse DFT of a spectrum [k1, k2] (k = k1 + N1 k2), as [p1, p2] (p = N2 p1 + p2), in three products.

    A power of two brings the spectrum's largest number to 16 to 32, and is taken back; for N2 < COLS the rest of its
    columns has to be zero.
    """
    p_f1, p_f2, p_tw, _, _ = places(p_const, N1, COLS, 1)
    largest = tl.max(tl.max(tl.maximum(tl.abs(b_re), tl.abs(b_im)), 1), 0)
    e = 4 - ((largest.to(tl.int32, bitcast=True) >> 23) - 127)
    b_up, b_down = power_of_two(e), power_of_two(-e)
    b_f0, b_f1, b_f2 = matrices(p_f2, COLS)
    b_low0, b_low1, b_low2 = matrices(p_f2 + 3 * COLS * COLS, COLS)
    b_re, b_im = complex_dot(b_re * b_up, b_im * b_up, b_f0, b_f2, b_f1, b_low0, b_low2, b_low1, False, True)
    b_tr, b_ti = tl.load(p_tw + o_place), tl.load(p_tw + N1 * COLS + o_place)
    b_vr = b_re * b_tr + b_im * b_ti
    b_vi = b_im * b_tr - b_re * b_ti
    b_f0, b_f1, b_f2 = matrices(p_f1, N1)
    b_low0, b_low1, b_low2 = matrices(p_f1 + 3 * N1 * N1, N1)
    b_re, b_im = complex_dot(b_vr, b_vi, b_f0, b_f2, b_f1, b_low0, b_low2, b_low1, True, True)
    return b_re * b_down, b_im * b_down


@triton.jit(do_not_specialize=["i_begin", "rows", "splits", "parts"])
def fft_finish_kernel(
    p_out, p_work, p_table, p_const, i_begin, rows, splits, parts, stride_or, stride_om,
    N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, R_WORK: tl.constexpr, COLS: tl.constexpr,
    AHEAD: tl.constexpr, IS_LIST: tl.constexpr,
):  # fmt: skip
    """Sum the spectra of a row's pairs and splits, invert, add positions [q M, (q + 1) M) to ``p_out``.

    Grid: (some of slots * rows, from ``i_begin`` on, R). AHEAD spectra are loaded together. They come from R_WORK
    residues of the first launch, a divisor of R.
    """
    M: tl.constexpr = N1 * N2
    THINNED: tl.constexpr = R // R_WORK
    SPECTRUM: tl.constexpr = 2 * M * R
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
    o_1 = tl.arange(0, N1)[:, None]
    o_2 = tl.arange(0, COLS)[None, :]
    o_place = o_1 * COLS + o_2
    m_col = (o_2 < N2) & (o_1 >= 0)
    _, _, _, p_fold, p_weights = places(p_const, N1, COLS, R)
    p_fold += o_place

    b_y = tl.zeros((N1, COLS), tl.float32)
    for i_residue in range(R):
        b_re = tl.zeros((N1, COLS), tl.float32)
        b_im = tl.zeros((N1, COLS), tl.float32)
        p_part = p_work + i_work * parts * SPECTRUM + (i_residue % R_WORK) * (2 * M * THINNED)
        p_part += i_residue // R_WORK + (o_1 + N1 * o_2) * THINNED
        for i_part in range(0, count, AHEAD):
            for u in tl.static_range(AHEAD):
                m_part = m_col & (i_part + u < count)
                b_re += tl.load(p_part + u * SPECTRUM, mask=m_part, other=0.0)
                b_im += tl.load(p_part + u * SPECTRUM + M * THINNED, mask=m_part, other=0.0)
            p_part += AHEAD * SPECTRUM
        b_xr, b_xi = _inverse(b_re, b_im, p_const, o_place, N1, COLS)
        # Conjugates of the forward weights: W_m^{-r p'} W_R^{-r q}; only the imaginary part is wanted.
        b_wr = tl.load(p_fold + 2 * N1 * COLS * i_residue)
        b_wi = tl.load(p_fold + 2 * N1 * COLS * i_residue + N1 * COLS)
        w_re = tl.load(p_weights + (i_chunk * i_residue) % R)
        w_im = tl.load(p_weights + R + (i_chunk * i_residue) % R)
        b_y += b_xi * (b_wr * w_re - b_wi * w_im) - b_xr * (b_wr * w_im + b_wi * w_re)
    p_y = p_out + i_row * stride_or + (i_chunk * M + o_1 * N2 + o_2).to(tl.int64) * stride_om
    tl.store(p_y, tl.load(p_y, mask=m_col) + b_y * (0.5 / (M * R)), mask=m_col)


def linear_fft(call: LinearCall | LinearStepsCall, *, workspace: int = 64 << 20) -> None:
    """Add the TensorSketch of each row's weight gradient to ``out``, by two launches.

    Without a metric. ``out`` is float32, activations and gradients float32, bfloat16 or float16, all of any strides.

    Args:
        call: m is 256, 512, ... 8192.
        workspace: bytes of temporary memory, 8 a bucket of each row and part (a pair's tokens, or a split of them);
            more rows take two launches more.
    """
    found = work(call)
    if found is None:
        return
    out, m = found.out, call.m
    a, g = found.activations, found.grad_outputs
    has_low = common.exact_products(a.dtype, g.dtype)
    config, finish = config_of(m, has_low, out.device), FINISH[m]
    table_out, table_in = call.tables[2], call.tables[5]
    const, inverse_const = constants(config, out.device, has_low), constants(finish, out.device, True)
    total = found.slots * found.rows
    programs = total * found.pairs * config.residues
    smallest = max(1, SMALLEST_PART // config.tokens)
    splits, per_split = common.parts(programs, found.longest, config.tokens, smallest, out.device)
    parts = found.pairs * splits
    chunk = min(total, max(1, workspace // (8 * m * parts)))
    spectra = out.new_empty(chunk * parts * 2 * m)
    d_in, d_out = a.shape[2], g.shape[2]
    row_in, row_out = rows_of(config, d_in, d_out)
    constants_of: dict[str, Any] = {
        "N1": config.rows, "N2": config.n2, "R": config.residues, "BLOCK_T": config.tokens,
        "MANY_IN": table_in.shape[1] > 1, "MANY_OUT": table_out.shape[1] > 1,
        "IS_WIDE": common.wide(a) or common.wide(g), "PREFETCH": config.prefetch, "HAS_LOW": has_low,
        "ROW_IN": row_in, "ROW_OUT": row_out, "num_warps": config.num_warps, "num_stages": 1, **found.constants,
    }  # fmt: skip
    for begin in range(0, total, chunk):
        count = min(chunk, total - begin)
        fft_sketch_kernel[(count, parts, config.residues)](
            spectra, a, g, found.table, table_in, table_out, const, begin, found.rows, found.longest, splits,
            per_split, table_in.shape[1], table_out.shape[1], d_in, d_out, *found.strides, **constants_of,
        )  # fmt: skip
        fft_finish_kernel[(count, finish.residues)](
            found.out, spectra, found.table, inverse_const, begin, found.rows, splits, parts, *found.out.stride(),
            N1=finish.rows, N2=finish.n2, R=finish.residues, R_WORK=config.residues, COLS=COLUMNS, AHEAD=AHEAD,
            IS_LIST=found.constants["IS_LIST"], num_warps=finish.num_warps, num_stages=1,
        )  # fmt: skip
