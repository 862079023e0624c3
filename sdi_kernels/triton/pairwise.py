"""Exact influence of (train, query) pairs: ``sum_{l,l'} (delta_l . delta'_l') (a_l . a'_l')``.

Shaped like attention without softmax: a program takes a block of train tokens and walks over query tokens. For each
block pair it forms the two score tiles ``delta delta'^T`` and ``a a'^T`` on tensor cores, multiplies them elementwise
and keeps the sum. Neither a gradient nor a score matrix reaches memory; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdi_kernels.triton import common, configs, tuning
from sdi_kernels.triton.rounding import operand


@triton.jit
def _scores(
    p_x, p_y, o_x, o_y, m_x, m_y, d, stride_xt, stride_xd, stride_yt, stride_yd,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, IS_HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK_X, BLOCK_Y] of ``x @ y^T`` over d features."""
    o_d = tl.arange(0, BLOCK_D)
    p_xd = p_x + o_x.to(tl.int64)[:, None] * stride_xt + o_d.to(tl.int64)[None, :] * stride_xd
    p_yd = p_y + o_y.to(tl.int64)[:, None] * stride_yt + o_d.to(tl.int64)[None, :] * stride_yd
    step_x = BLOCK_D * tl.cast(stride_xd, tl.int64)
    step_y = BLOCK_D * tl.cast(stride_yd, tl.int64)
    b_acc = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    for i_d in range(0, d, BLOCK_D):
        m_d = (i_d + o_d < d)[None, :]
        b_x = tl.load(p_xd, mask=m_x[:, None] & m_d, other=0.0)
        b_y = tl.load(p_yd, mask=m_y[:, None] & m_d, other=0.0)
        if not IS_HALF:
            b_x = operand(b_x.to(tl.float32), PRECISION)
            b_y = operand(b_y.to(tl.float32), PRECISION)
        b_acc = tl.dot(b_x, tl.trans(b_y), b_acc, input_precision=PRECISION)
        p_xd += step_x
        p_yd += step_y
    return b_acc


# Token counts vary from call to call and gain nothing from a program of their own.
@triton.jit(do_not_specialize=["tokens", "query_tokens", "queries_per_split"])
def pairwise_kernel(
    p_out, p_a, p_g, p_qa, p_qg, tokens, query_tokens, queries_per_split, d_in, d_out,
    stride_ap, stride_at, stride_ad, stride_gp, stride_gt, stride_gd,
    stride_qap, stride_qat, stride_qad, stride_qgp, stride_qgt, stride_qgd,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, IS_HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial influence of one block of train tokens with one split of query tokens. Grid: (pairs * blocks, splits)."""
    blocks = tl.cdiv(tokens, BLOCK_X)
    i_pair = (tl.program_id(0) // blocks).to(tl.int64)
    o_x = (tl.program_id(0) % blocks) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < tokens
    i_first = tl.program_id(1) * queries_per_split
    i_last = tl.minimum(i_first + queries_per_split, query_tokens)
    b_sum = tl.zeros((BLOCK_X,), tl.float32)
    for i_y in range(i_first, i_last, BLOCK_Y):
        o_y = i_y + tl.arange(0, BLOCK_Y)
        m_y = o_y < i_last
        b_delta = _scores(
            p_g + i_pair * stride_gp, p_qg + i_pair * stride_qgp, o_x, o_y, m_x, m_y, d_out,
            stride_gt, stride_gd, stride_qgt, stride_qgd, BLOCK_X, BLOCK_Y, BLOCK_D, IS_HALF, PRECISION,
        )  # fmt: skip
        b_act = _scores(
            p_a + i_pair * stride_ap, p_qa + i_pair * stride_qap, o_x, o_y, m_x, m_y, d_in,
            stride_at, stride_ad, stride_qat, stride_qad, BLOCK_X, BLOCK_Y, BLOCK_D, IS_HALF, PRECISION,
        )  # fmt: skip
        b_sum += tl.sum(b_delta * b_act, 1)
    p_part = p_out + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_part, tl.sum(b_sum, 0))


def pairwise(
    activations: Tensor, grad_outputs: Tensor, query_activations: Tensor, query_grad_outputs: Tensor
) -> Tensor:
    """Exact inner products of the weight gradients of pairs: (P,) float32.

    Args:
        activations: (P, T, d_in); grad_outputs: (P, T, d_out): the train side.
        query_activations: (P, T', d_in); query_grad_outputs: (P, T', d_out): the query side.
            float32, bfloat16 or float16, any strides (expand one query over all pairs: stride 0 costs nothing).
    """
    inputs = (activations, grad_outputs, query_activations, query_grad_outputs)
    pairs, tokens, d_in = activations.shape
    query_tokens = query_activations.shape[1]
    if 0 in (pairs, tokens, query_tokens):
        return activations.new_zeros(pairs, dtype=torch.float32)
    kind = configs.kind(*(t.dtype for t in inputs))
    precision = common.dot_precision(*inputs)
    config = tuning.tuned(activations.device).tile(f"pairwise {kind}")
    assert isinstance(config, configs.PairwiseConfig)
    blocks = common.cdiv(tokens, config.block_train)
    splits, per_split = common.parts(pairs * blocks, query_tokens, config.block_query, 1, activations.device)
    partial = activations.new_empty(pairs, blocks * splits, dtype=torch.float32)
    pairwise_kernel[(pairs * blocks, splits)](
        partial, *inputs, tokens, query_tokens, per_split, d_in, grad_outputs.shape[-1],
        *(s for t in inputs for s in t.stride()),
        BLOCK_X=config.block_train, BLOCK_Y=config.block_query, BLOCK_D=config.block_d, IS_HALF=kind == "half",
        PRECISION=precision, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial.sum(1)
