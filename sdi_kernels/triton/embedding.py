"""TensorSketch of embedding gradients: ``TS(onehot(id) (x) delta) = s_out(id) roll(CS_in(delta), h_out(id))``.

A program owns a block of buckets of one row and walks over the row's tokens: bucket p takes the sources of bucket
``p - h_out(id)`` of the input side. Every gradient element is read once, sums stay in registers, and there are no
atomics unless the tokens of few rows are split to fill the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sdi_kernels.calls import EmbeddingCall
from sdi_kernels.triton import common

BLOCK_T = 8
BLOCK_M = 256
NUM_WARPS = 4


# Token counts vary from call to call and gain nothing from a program of their own.
@triton.jit(do_not_specialize=["tokens", "tokens_per_split"])
def embedding_sketch_kernel(
    p_out, p_ids, p_g, p_h_out, p_s_out, p_table, tokens, tokens_per_split, vocabulary, m, width,
    stride_or, stride_om, stride_ir, stride_it, stride_gr, stride_gt, stride_gd,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, IS_ATOMIC: tl.constexpr,
):  # fmt: skip
    """Sketch of BLOCK_M buckets over one split of tokens. Grid: (rows * tiles of m, splits)."""
    tiles = tl.cdiv(m, BLOCK_M)
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < m
    i_first = tl.program_id(1) * tokens_per_split
    i_last = tl.minimum(i_first + tokens_per_split, tokens)
    p_ix = p_ids + i_row * stride_ir
    p_gx = p_g + i_row * stride_gr
    b_acc = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for i_t in range(i_first, i_last, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = o_t < i_last
        b_id = tl.load(p_ix + o_t.to(tl.int64) * stride_it, mask=m_t, other=0).to(tl.int64)
        m_id = m_t & (b_id >= 0) & (b_id < vocabulary)
        h_o = tl.load(p_h_out + b_id, mask=m_id, other=0)
        s_o = tl.load(p_s_out + b_id, mask=m_id, other=0).to(tl.float32)
        # An id outside the vocabulary must not pass unseen: it makes its row NaN.
        s_o = tl.where(m_t & (m_id == 0), float("nan"), s_o)
        o_q = o_m[None, :] - h_o[:, None]
        o_q = tl.where(o_q < 0, o_q + m, o_q)
        b_x = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
        for j in range(width):
            m_q = m_id[:, None] & m_m[None, :]
            v = tl.load(p_table + o_q.to(tl.int64) * width + j, mask=m_q, other=0)
            p_x = p_gx + o_t.to(tl.int64)[:, None] * stride_gt + (tl.abs(v) - 1).to(tl.int64) * stride_gd
            x = tl.load(p_x, mask=v != 0, other=0.0).to(tl.float32)
            b_x += tl.where(v < 0, -x, x)
        b_acc += b_x * s_o[:, None]
    b_sum = tl.sum(b_acc, 0)
    p_bin = p_out + i_row * stride_or + o_m.to(tl.int64) * stride_om
    if IS_ATOMIC:
        tl.atomic_add(p_bin, b_sum, mask=m_m, sem="relaxed")
    else:
        tl.store(p_bin, tl.load(p_bin, mask=m_m, other=0.0) + b_sum, mask=m_m)


def embedding(call: EmbeddingCall) -> None:
    """Add the TensorSketch of each row's embedding gradient to ``out``; an id outside the vocabulary makes it NaN.

    ``out`` is float32, gradients float32, bfloat16 or float16, all of any strides.
    """
    out, token_ids, grad_outputs, tables, m = call
    rows, tokens, _ = grad_outputs.shape
    if rows == 0 or tokens == 0:
        return
    h_out, s_out, _, _, _, table = tables
    programs = rows * common.cdiv(m, BLOCK_M)
    deterministic = torch.are_deterministic_algorithms_enabled()
    splits, per_split = common.parts(programs, tokens, BLOCK_T, 4, out.device, whole=deterministic)
    embedding_sketch_kernel[(programs, splits)](
        out, token_ids, grad_outputs, h_out, s_out, table, tokens, per_split, h_out.shape[0], m, table.shape[1],
        *out.stride(), *token_ids.stride(), *grad_outputs.stride(),
        BLOCK_T=BLOCK_T, BLOCK_M=BLOCK_M, IS_ATOMIC=splits > 1, num_warps=NUM_WARPS,
    )  # fmt: skip
