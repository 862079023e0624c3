"""The second launch of the ``fft`` route: a row's spectra summed over pairs and splits, and transformed back.

Doing that at the end of the first launch costs registers that its token loop needs: it spilled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdi_kernels.triton.products import left_dot, matrix, places, power_of_two, right_dot
from sdi_kernels.triton.uses import slot

AHEAD = 4
"""Spectra of parts that are loaded together."""


@triton.jit
def _inverse(b_re, b_im, p_const, o_place, N1: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr):
    """Unscaled inverse DFT of a spectrum [k1, k2] (k = k1 + N1 k2), as [p1, p2] (p = N2 p1 + p2), in three products.

    A power of two brings the spectrum's largest number to 16 to 32, and is taken back; for N2 < COLS the rest of its
    columns has to be zero.
    """
    p_f1, p_f2, p_tw, _, _ = places(p_const, N1, COLS, R)
    largest = tl.max(tl.max(tl.maximum(tl.abs(b_re), tl.abs(b_im)), 1), 0)
    e = 4 - ((largest.to(tl.int32, bitcast=True) >> 23) - 127)
    b_up, b_down = power_of_two(e), power_of_two(-e)
    b_f0, b_f1, b_f2 = matrix(p_f2, COLS, 0), matrix(p_f2, COLS, 1), matrix(p_f2, COLS, 2)
    b_low0, b_low1, b_low2 = matrix(p_f2, COLS, 3), matrix(p_f2, COLS, 4), matrix(p_f2, COLS, 5)
    b_re, b_im = right_dot(b_re * b_up, b_im * b_up, b_f0, b_f2, b_f1, b_low0, b_low2, b_low1, True)
    b_tr, b_ti = tl.load(p_tw + o_place), tl.load(p_tw + N1 * COLS + o_place)
    b_vr = b_re * b_tr + b_im * b_ti
    b_vi = b_im * b_tr - b_re * b_ti
    b_f_re, b_f_im = matrix(p_f1, N1, 0), matrix(p_f1, N1, 1)
    b_low_re, b_low_im = matrix(p_f1, N1, 2), matrix(p_f1, N1, 3)
    b_re, b_im = left_dot(b_vr, b_vi, b_f_re, b_f_im, b_low_re, b_low_im, True, True)
    return b_re * b_down, b_im * b_down


@triton.jit(do_not_specialize=["i_begin", "rows", "splits", "parts"])
def fft_finish_kernel(
    p_out, p_work, p_table, p_const, i_begin, rows, splits, parts, stride_or, stride_om,
    N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, COLS: tl.constexpr,
    AHEAD: tl.constexpr, IS_LIST: tl.constexpr,
):  # fmt: skip
    """Sum the spectra of a row's pairs and splits, invert, add positions [q M, (q + 1) M) to ``p_out``.

    Grid: (some of slots * rows, from ``i_begin`` on, R). AHEAD spectra are loaded together. They come from R_WORK
    residues of the first launch, a divisor of R.
    """
    M: tl.constexpr = N1 * N2
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
        p_part = p_work + i_work * parts * SPECTRUM + i_residue * (2 * M) + o_1 + N1 * o_2
        for i_part in range(0, count, AHEAD):
            for u in tl.static_range(AHEAD):
                m_part = m_col & (i_part + u < count)
                b_re += tl.load(p_part + u * SPECTRUM, mask=m_part, other=0.0)
                b_im += tl.load(p_part + u * SPECTRUM + M, mask=m_part, other=0.0)
            p_part += AHEAD * SPECTRUM
        b_xr, b_xi = _inverse(b_re, b_im, p_const, o_place, N1, COLS, R)
        # Conjugates of the forward weights: W_m^{-r p'} W_R^{-r q}; only the imaginary part is wanted.
        b_wr = tl.load(p_fold + 2 * N1 * COLS * i_residue)
        b_wi = tl.load(p_fold + 2 * N1 * COLS * i_residue + N1 * COLS)
        w_re = tl.load(p_weights + (i_chunk * i_residue) % R)
        w_im = tl.load(p_weights + R + (i_chunk * i_residue) % R)
        b_y += b_xi * (b_wr * w_re - b_wi * w_im) - b_xr * (b_wr * w_im + b_wi * w_re)
    p_y = p_out + i_row * stride_or + (i_chunk * M + o_1 * N2 + o_2).to(tl.int64) * stride_om
    tl.store(p_y, tl.load(p_y, mask=m_col) + b_y * (0.5 / (M * R)), mask=m_col)
