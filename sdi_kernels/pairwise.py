"""Exact influence of (train, query) pairs from activations and output gradients, without a gradient in memory.

For a linear layer the inner product of two weight gradients is a sum over token pairs (docs/kernels.md):
``<sum_l delta_l (x) a_l, sum_l' delta'_l' (x) a'_l'> = sum_{l,l'} (delta_l . delta'_l') (a_l . a'_l')``.
It re-ranks a short list exactly, and checks sketches at full size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdi_kernels import _checks
from sdi_kernels.workspace import workspace_bytes


def _influence(a: Tensor, g: Tensor, qa: Tensor, qg: Tensor) -> Tensor:
    """The plain-torch route: score matrices of a chunk of pairs and train tokens at a time."""
    dtype = _checks.sketch_dtype(a, g, qa, qg)
    pairs, tokens, d_in = a.shape
    query_tokens, d_out = qa.shape[1], g.shape[-1]
    out = a.new_zeros(pairs, dtype=dtype)
    # Per train token: two rows of scores and their product, and its share of the converted inputs.
    item = out.element_size()
    budget = workspace_bytes(a.device)
    per_pair = item * query_tokens * (d_in + d_out)
    per_token = item * (3 * query_tokens + d_in + d_out)
    step_t = max(1, min(tokens, (budget - per_pair) // per_token))
    step_p = max(1, budget // (per_pair + step_t * per_token))
    for p in range(0, pairs, step_p):
        some = slice(p, p + step_p)
        qa_t, qg_t = (x[some].to(dtype).transpose(1, 2) for x in (qa, qg))
        for t in range(0, tokens, step_t):
            part = slice(t, t + step_t)
            scores = torch.bmm(g[some, part].to(dtype), qg_t)
            out[some] += scores.mul_(torch.bmm(a[some, part].to(dtype), qa_t)).sum((1, 2))
    return out


@torch.library.custom_op("sdi_kernels::pairwise_linear_influence", mutates_args=())
def _pairwise(
    activations: Tensor, grad_outputs: Tensor, query_activations: Tensor, query_grad_outputs: Tensor
) -> Tensor:
    return _influence(activations, grad_outputs, query_activations, query_grad_outputs)


@_pairwise.register_fake
def _(activations: Tensor, grad_outputs: Tensor, query_activations: Tensor, query_grad_outputs: Tensor) -> Tensor:
    dtype = _checks.sketch_dtype(activations, grad_outputs, query_activations, query_grad_outputs)
    return activations.new_empty(activations.shape[0], dtype=dtype)


@_pairwise.register_kernel("cuda")
def _(activations: Tensor, grad_outputs: Tensor, query_activations: Tensor, query_grad_outputs: Tensor) -> Tensor:
    from sdi_kernels.triton import available, common

    inputs = (activations, grad_outputs, query_activations, query_grad_outputs)
    if not available() or not common.supported(*inputs):
        return _influence(*inputs)
    from sdi_kernels.triton.pairwise import pairwise

    with torch.cuda.device(activations.device):
        return pairwise(*inputs)


def pairwise_linear_influence(
    activations: Tensor, grad_outputs: Tensor, query_activations: Tensor, query_grad_outputs: Tensor
) -> Tensor:
    """Exact inner products of the weight gradients of (train, query) pairs of a linear layer.

    Positive where a training step on the train example lowers the query's loss. Not differentiable.

    Args:
        activations: the layer's input on the train side, ``(P, T, d_in)``; float32, bfloat16, float16 or float64.
        grad_outputs: gradient at the layer's output, ``(P, T, d_out)``.
        query_activations: the same for the query side, ``(P, T', d_in)``; ``T'`` may differ from ``T``. Use
            ``expand`` to pair one query with many train examples; nothing is copied.
        query_grad_outputs: ``(P, T', d_out)``.

    Returns:
        ``(P,)``, float32 (float64 if an input is): ``sum_{l,l'} (delta_l . delta'_l') (a_l . a'_l')``. On GPUs, fp32
        products follow ``torch.get_float32_matmul_precision()``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    a = _checks.float_tensor("activations", activations, min_dim=3)
    g = _checks.float_tensor("grad_outputs", grad_outputs, min_dim=3)
    qa = _checks.float_tensor("query_activations", query_activations, min_dim=3)
    qg = _checks.float_tensor("query_grad_outputs", query_grad_outputs, min_dim=3)
    for name, value in {"activations": a, "grad_outputs": g, "query_activations": qa, "query_grad_outputs": qg}.items():
        if value.dim() != 3 or value.shape[0] != a.shape[0]:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}; pass (pairs, tokens, features) with {a.shape[0]} pairs, "
                "flatten or expand the leading dimensions"
            )
    if g.shape[1] != a.shape[1] or qg.shape[1] != qa.shape[1]:
        raise ValueError(
            f"grad_outputs, query_grad_outputs: got {g.shape[1]} and {qg.shape[1]} tokens, "
            f"activations have {a.shape[1]} and {qa.shape[1]}; both must be over the same tokens"
        )
    if qa.shape[2] != a.shape[2] or qg.shape[2] != g.shape[2]:
        raise ValueError(
            f"query_activations, query_grad_outputs: got widths {qa.shape[2]} and {qg.shape[2]}, "
            f"the train side has {a.shape[2]} and {g.shape[2]}; both must come from the same layer"
        )
    _checks.same_device(activations=a, grad_outputs=g, query_activations=qa, query_grad_outputs=qg)
    result: Tensor = _pairwise(a.detach(), g.detach(), qa.detach(), qg.detach())
    return result
