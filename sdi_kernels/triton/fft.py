"""The ``fft`` route: TensorSketch by a transform on tensor cores, multiply-accumulated in the frequency domain.

Per token, both CountSketches become one complex sequence ``z = CS_out(delta) + i CS_in(a)`` of length m, gathered
through the inverse tables. Its DFT runs as two small matrix products with a twiddle between them (m = N1 x N2); the
squares add up over tokens in registers. At the end ``TS = Im(ifft(sum_l fft(z_l)^2)) / 2``.

A program is one warpgroup with a block [64, 32]: ``F1 z`` puts its rows where ``(...) F2`` reads them as an operand, so
that nothing but z goes through shared memory. Small transforms lie side by side, several tokens to a block; F2 is then
block diagonal. Operands are fp16: a power of two per token brings both sides to a norm of 45 to
91, and what has been taken out of a token's product comes back as it is added up. fp16 keeps as many bits as tf32, at
twice the rate; for fp32 inputs operands are sums of two fp16 numbers, and products three of theirs.

A transform that no block holds is split by frequency residue: program r of R owns the m/R frequencies
``k = R k' + r``. It folds the R chunks of z with the weights ``W_R^{q r}`` and transforms m/R points times
``W_m^{n' r}``, of which the matrices of the first stage hold one part and the twiddles the other. A second, small
launch (inverse.py) sums token splits and inverts the transform, once per row. No atomics anywhere: the result is the
same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdi_kernels.calls import LinearCall, LinearStepsCall
from sdi_kernels.triton import common
from sdi_kernels.triton.gather import HEAD, gather, load_side, load_slots, sketch_side, sources, sums
from sdi_kernels.triton.inverse import AHEAD, fft_finish_kernel
from sdi_kernels.triton.products import left_dot, left_dot_short, left_half, matrix, places, power_of_two, right_dot
from sdi_kernels.triton.slots import constants_of, side
from sdi_kernels.triton.transforms import COLUMNS, FINISH, config_of, constants
from sdi_kernels.triton.uses import PAIR, pair, slot, work

SMALLEST_PART = 4
"""Tokens that a program keeps at least: what a part costs to finish is about what one of its tokens costs."""


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


@triton.jit
def _folded(b_x, b_w_re, b_w_im, CHUNKS: tl.constexpr, R: tl.constexpr):
    """Chunks [CHUNKS, M] of a side times the weights of a residue, summed: Re, Im, and the squares' sum over chunks."""
    if CHUNKS == 1:
        b_re, b_im, b_sq = b_x, tl.zeros_like(b_x), b_x * b_x
    else:
        b_re, b_sq = tl.sum(b_x * b_w_re[:, None], 0), tl.sum(b_x * b_x, 0)
        b_im = tl.sum(b_x * b_w_im[:, None], 0) if R > 2 else b_re  # the square roots of one are real
    return b_re, b_im, b_sq


@triton.jit
def _alternating(b_x, CHUNKS: tl.constexpr):
    """The fold of two chunks for residue 1 of 2, the sum for 0: weights 1 and -1."""
    if CHUNKS == 2:
        b_x = tl.sum(b_x * (1.0 - 2.0 * tl.arange(0, 2)[:, None]), 0)
    return b_x


@triton.jit
def _second_stage(
    b_ur, b_ui, b_tr, b_ti, b_f20, b_f21, b_f22, b_low20, b_low21, b_low22, HAS_LOW: tl.constexpr
):  # fmt: skip
    """Twiddles, and the product with the second matrix: a DFT as [k1, k2] (k = k1 + N1 k2)."""
    b_vr = b_ur * b_tr - b_ui * b_ti
    b_vi = b_ur * b_ti + b_ui * b_tr
    return right_dot(b_vr, b_vi, b_f20, b_f21, b_f22, b_low20, b_low21, b_low22, HAS_LOW)


@triton.jit
def _first_matrices(p_f1, N1: tl.constexpr, IS_SHORT: tl.constexpr, HAS_LOW: tl.constexpr):
    """Of the first stage, high and (HAS_LOW) low halves; ``IS_SHORT``: of their left half."""
    if IS_SHORT:
        b_re, b_im = left_half(p_f1, N1, 0), left_half(p_f1, N1, 1)
        b_low_re, b_low_im = b_re, b_im
        if HAS_LOW:
            b_low_re, b_low_im = left_half(p_f1, N1, 2), left_half(p_f1, N1, 3)
    else:
        b_re, b_im = matrix(p_f1, N1, 0), matrix(p_f1, N1, 1)
        b_low_re, b_low_im = b_re, b_im
        if HAS_LOW:
            b_low_re, b_low_im = matrix(p_f1, N1, 2), matrix(p_f1, N1, 3)
    return b_re, b_im, b_low_re, b_low_im


@triton.jit
def _upper_and_lower(b_x, N1: tl.constexpr, N2: tl.constexpr):
    """Both halves of [N1 * N2] as [N1 / 2, N2]."""
    b_upper, b_lower = tl.split(b_x.reshape(2, N1 * N2 // 2).permute(1, 0))
    return b_upper.reshape(N1 // 2, N2), b_lower.reshape(N1 // 2, N2)


# Counts of rows and tokens vary from call to call and gain nothing from a program of their own.
@triton.jit(
    do_not_specialize=[
        "i_begin", "rows", "tokens", "splits", "tokens_per_split", "passes_in", "passes_out", "table_step",
    ]
)  # fmt: skip
def fft_sketch_kernel(
    p_work, p_a, p_g, p_table, p_table_in, p_table_out, p_const, i_begin, rows, tokens, splits,
    tokens_per_split, passes_in, passes_out, table_step, d_in, d_out,
    stride_ar, stride_at, stride_ad, stride_gr, stride_gt, stride_gd,
    N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
    ROW_IN: tl.constexpr, SLOTS_IN: tl.constexpr, CHUNKS_IN: tl.constexpr, IS_KEPT_IN: tl.constexpr,
    IS_LONG_IN: tl.constexpr,
    ROW_OUT: tl.constexpr, SLOTS_OUT: tl.constexpr, CHUNKS_OUT: tl.constexpr, IS_KEPT_OUT: tl.constexpr,
    IS_LONG_OUT: tl.constexpr,
    IS_WHOLE: tl.constexpr, IS_SHORT: tl.constexpr, IS_WIDE: tl.constexpr, PREFETCH: tl.constexpr,
    HAS_LOW: tl.constexpr, IS_LIST: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sum over one row's tokens (or one split of them) of the squared spectra, for one frequency residue.

    Grid: (some of slots * rows, from ``i_begin`` on, pairs * splits, R). Each program writes its m/R frequencies, in
    order, real parts before imaginary ones, into the workspace. ``IS_WHOLE``: a program for both residues of two, where
    the gather takes more than the transform. ``IS_SHORT``: a's sketch lies in the upper half of a block. Tables: for
    BLOCK_T 1 slots, else the inverse ones, with as many passes as sources. ``table_step`` is 0, which the compiler does
    not know: it would keep in registers what is to be read for every token.
    """
    M: tl.constexpr = N1 * N2
    M_IN: tl.constexpr = M // 2 if IS_SHORT else M
    COLS: tl.constexpr = BLOCK_T * N2
    IS_LONG: tl.constexpr = IS_LONG_IN or IS_LONG_OUT
    IS_MIXED: tl.constexpr = SLOTS_IN * CHUNKS_IN > 1 or SLOTS_OUT * CHUNKS_OUT > 1
    # Rows that have the shape of something else share its layout.
    NARROW_IN: tl.constexpr = ROW_IN == M and IS_MIXED
    NARROW_OUT: tl.constexpr = (ROW_OUT == M and IS_MIXED) or (ROW_OUT == M_IN and IS_SHORT)
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

    p_f1, p_f2, p_tw, _, p_weights = places(p_const, N1, COLS, R)
    p_f1 += 4 * N1 * N1 * i_residue
    p_tw += 2 * N1 * COLS * i_residue
    b_f1_re, b_f1_im, b_low1_re, b_low1_im = _first_matrices(p_f1, N1, IS_SHORT, HAS_LOW)
    b_f20, b_f21, b_f22 = matrix(p_f2, COLS, 0), matrix(p_f2, COLS, 1), matrix(p_f2, COLS, 2)
    b_low20, b_low21, b_low22 = b_f20, b_f21, b_f22
    if HAS_LOW:
        b_low20, b_low21, b_low22 = matrix(p_f2, COLS, 3), matrix(p_f2, COLS, 4), matrix(p_f2, COLS, 5)
    b_tr, b_ti = tl.load(p_tw + o_place), tl.load(p_tw + N1 * COLS + o_place)
    o_in, o_out = tl.arange(0, CHUNKS_IN) * i_residue % R, tl.arange(0, CHUNKS_OUT) * i_residue % R
    b_a_wr, b_a_wi = tl.load(p_weights + o_in), tl.load(p_weights + R + o_in)
    b_g_wr, b_g_wi = tl.load(p_weights + o_out), tl.load(p_weights + R + o_out)

    i_first = i_split * tokens_per_split
    i_last = tl.minimum(i_first + tokens_per_split, tokens)
    step_a = BLOCK_T * tl.cast(stride_at, tl.int64)
    step_g = BLOCK_T * tl.cast(stride_gt, tl.int64)
    b_acc_re = tl.zeros((N1, COLS), tl.float32)
    b_acc_im = tl.zeros((N1, COLS), tl.float32)
    if IS_SHORT:
        b_f1_re_2, b_f1_im_2, b_low1_re_2, b_low1_im_2 = _first_matrices(p_f1 + N1 // 2, N1, True, HAS_LOW)
    if IS_WHOLE:
        b_f1_re_2, b_f1_im_2, b_low1_re_2, b_low1_im_2 = _first_matrices(p_f1 + 4 * N1 * N1, N1, False, HAS_LOW)
        p_tw += 2 * N1 * COLS
        b_tr_2, b_ti_2 = tl.load(p_tw + o_place), tl.load(p_tw + N1 * COLS + o_place)
        b_acc_re_2, b_acc_im_2 = b_acc_re, b_acc_im
    if BLOCK_T == 1:
        p_gx = p_g + i_first * step_g
        p_ax = p_a + i_first * step_a
        o_g, b_g_sign = load_slots(p_table_out, CHUNKS_OUT * (SLOTS_OUT if SLOTS_OUT > 0 else 1), M)
        o_a, b_a_sign = load_slots(p_table_in, CHUNKS_IN * (SLOTS_IN if SLOTS_IN > 0 else 1), M_IN)
        if PREFETCH:  # the next token's values are loaded while this one is transformed
            more = i_first < i_last
            b_g = load_side(p_gx, stride_gd, d_out, more, ROW_OUT, SLOTS_OUT, CHUNKS_OUT, M, NARROW_OUT)
            b_a = load_side(p_ax, stride_ad, d_in, more, ROW_IN, SLOTS_IN, CHUNKS_IN, M_IN, NARROW_IN)
    else:
        o_at = (i_first + o_token).to(tl.int64)
        p_ax = p_a + o_at * stride_at
        p_gx = p_g + o_at * stride_gt
        if not IS_LONG:
            o_g, b_g_sign = sources(p_table_out, o_bucket)
            o_a, b_a_sign = sources(p_table_in, o_bucket)
    for i_t in range(i_first, i_last, BLOCK_T):
        if BLOCK_T == 1:
            if PREFETCH:
                c_g, c_a = b_g, b_a
                more = i_t + 1 < i_last
                b_g = load_side(p_gx + step_g, stride_gd, d_out, more, ROW_OUT, SLOTS_OUT, CHUNKS_OUT, M, NARROW_OUT)
                b_a = load_side(p_ax + step_a, stride_ad, d_in, more, ROW_IN, SLOTS_IN, CHUNKS_IN, M_IN, NARROW_IN)
            else:
                c_g = load_side(p_gx, stride_gd, d_out, True, ROW_OUT, SLOTS_OUT, CHUNKS_OUT, M, NARROW_OUT)
                c_a = load_side(p_ax, stride_ad, d_in, True, ROW_IN, SLOTS_IN, CHUNKS_IN, M_IN, NARROW_IN)
            step = tl.multiple_of(i_t * table_step, HEAD)
            c_g = sketch_side(
                c_g, p_gx, stride_gd, d_out, o_g, b_g_sign, p_table_out + step, passes_out,
                ROW_OUT, SLOTS_OUT, CHUNKS_OUT, M, IS_KEPT_OUT, IS_LONG_OUT,
            )  # fmt: skip
            c_a = sketch_side(
                c_a, p_ax, stride_ad, d_in, o_a, b_a_sign, p_table_in + step, passes_in,
                ROW_IN, SLOTS_IN, CHUNKS_IN, M_IN, IS_KEPT_IN, IS_LONG_IN,
            )  # fmt: skip
            if IS_WHOLE:
                c_g_2, c_a_2 = _alternating(c_g, CHUNKS_OUT), _alternating(c_a, CHUNKS_IN)
            c_g, c_g_im, c_g_sq = _folded(c_g, b_g_wr, b_g_wi, CHUNKS_OUT, R)
            c_a, c_a_im, c_a_sq = _folded(c_a, b_a_wr, b_a_wi, CHUNKS_IN, R)
            if IS_SHORT:
                c_g_sq = tl.sum(c_g_sq.reshape(2, M_IN), 0)
            b_g_up, b_a_up, b_down = _scales(c_g_sq, c_a_sq, N1, N2, BLOCK_T)
            b_zr, b_zi = c_g * b_g_up, c_a * b_a_up
            if R > 2:
                b_zr -= c_a_im * b_a_up
                b_zi += c_g_im * b_g_up
            if IS_SHORT:
                b_zr, b_zr_2 = _upper_and_lower(b_zr, N1, N2)
                b_zi = b_zi.reshape(N1 // 2, N2)
            else:
                b_zr, b_zi = b_zr.reshape(N1, N2), b_zi.reshape(N1, N2)
        else:
            m_token = i_t + o_token < i_last
            if IS_LONG:
                c_g = sums(p_gx, p_table_out, o_bucket, stride_gd, passes_out, m_token)
                c_a = sums(p_ax, p_table_in, o_bucket, stride_ad, passes_in, m_token)
            else:
                c_g = gather(p_gx, o_g, b_g_sign, stride_gd, m_token)
                c_a = gather(p_ax, o_a, b_a_sign, stride_ad, m_token)
            b_g_up, b_a_up, b_down = _scales(c_g * c_g, c_a * c_a, N1, N2, BLOCK_T)
            b_zr, b_zi = c_g * b_g_up, c_a * b_a_up
        p_ax += step_a
        p_gx += step_g
        if IS_SHORT:
            b_ur, b_ui = left_dot_short(
                b_zr, b_zi, b_zr_2, b_f1_re, b_f1_im, b_low1_re, b_low1_im,
                b_f1_re_2, b_f1_im_2, b_low1_re_2, b_low1_im_2, HAS_LOW,
            )  # fmt: skip
        else:
            b_ur, b_ui = left_dot(b_zr, b_zi, b_f1_re, b_f1_im, b_low1_re, b_low1_im, False, HAS_LOW)
        b_sr, b_si = _second_stage(
            b_ur, b_ui, b_tr, b_ti, b_f20, b_f21, b_f22, b_low20, b_low21, b_low22, HAS_LOW
        )  # fmt: skip
        b_acc_re += (b_sr * b_sr - b_si * b_si) * b_down
        b_acc_im += (b_sr * b_si) * b_down
        if IS_WHOLE:
            b_zr, b_zi = (c_g_2 * b_g_up).reshape(N1, N2), (c_a_2 * b_a_up).reshape(N1, N2)
            b_ur, b_ui = left_dot(b_zr, b_zi, b_f1_re_2, b_f1_im_2, b_low1_re_2, b_low1_im_2, False, HAS_LOW)
            b_sr, b_si = _second_stage(
                b_ur, b_ui, b_tr_2, b_ti_2, b_f20, b_f21, b_f22, b_low20, b_low21, b_low22, HAS_LOW
            )  # fmt: skip
            b_acc_re_2 += (b_sr * b_sr - b_si * b_si) * b_down
            b_acc_im_2 += (b_sr * b_si) * b_down

    if BLOCK_T > 1:
        b_acc_re = tl.sum(b_acc_re.reshape(N1, BLOCK_T, N2), 1)
        b_acc_im = tl.sum(b_acc_im.reshape(N1, BLOCK_T, N2), 1)
    o_freq = o_1[:, None] + N1 * tl.arange(0, N2)[None, :]
    p_part = p_work + ((i_work * tl.num_programs(1) + i_part) * R + i_residue) * (2 * M) + o_freq
    tl.store(p_part, b_acc_re)
    tl.store(p_part + M, 2.0 * b_acc_im)
    if IS_WHOLE:
        tl.store(p_part + 2 * M, b_acc_re_2)
        tl.store(p_part + 3 * M, 2.0 * b_acc_im_2)


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
    config, finish = config_of(m, has_low, common.shared_bytes(out.device)), FINISH[m]
    const, inverse_const = constants(config, out.device, has_low), constants(finish, out.device, True)
    table_out, layout_out = side(call.tables[2], g.shape[2], g.element_size(), config)
    table_in, layout_in = side(call.tables[5], a.shape[2], a.element_size(), config)
    compiled_for = {
        "N1": config.rows, "N2": config.n2, "R": config.residues, "BLOCK_T": config.tokens, "HAS_LOW": has_low,
        **constants_of((layout_in, layout_out), max(a.element_size(), g.element_size()), config),
        "IS_WIDE": common.wide(a) or common.wide(g), "num_warps": config.num_warps, "num_stages": 1, **found.constants,
    }  # fmt: skip
    residues = 1 if compiled_for["IS_WHOLE"] else config.residues
    total = found.slots * found.rows
    programs = total * found.pairs * residues
    smallest = max(1, SMALLEST_PART // config.tokens)
    splits, per_split = common.parts(programs, found.longest, config.tokens, smallest, out.device)
    parts = found.pairs * splits
    chunk = min(total, max(1, workspace // (8 * m * parts)))
    spectra = out.new_empty(chunk * parts * 2 * m)
    for begin in range(0, total, chunk):
        count = min(chunk, total - begin)
        fft_sketch_kernel[(count, parts, residues)](
            spectra, a, g, found.table, table_in, table_out, const, begin, found.rows, found.longest, splits, per_split,
            layout_in.passes, layout_out.passes, 0, a.shape[2], g.shape[2], *found.strides, **compiled_for,
        )  # fmt: skip
        fft_finish_kernel[(count, finish.residues)](
            found.out, spectra, found.table, inverse_const, begin, found.rows, splits, parts, *found.out.stride(),
            N1=finish.rows, N2=finish.n2, R=finish.residues, COLS=COLUMNS, AHEAD=AHEAD,
            IS_LIST=found.constants["IS_LIST"], num_warps=finish.num_warps, num_stages=1,
        )  # fmt: skip
