"""The arguments of each accumulating operator, in the operator's order.

An operator makes one of these of what it was called with, and hands it to its check (:mod:`sdi_kernels.borders`) and to
whatever computes it: plain torch, the compiled CPU kernels or the Triton launchers. The schema that
:mod:`sdi_kernels.ops` registers is read from the same fields. Shapes and dtypes are said there.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Annotations stay types, not strings: torch reads the operators' schemas from them.


class LinearCall(NamedTuple):
    """``out[r] += TS(metric * sum_l grad_outputs[r, l] (x) activations[r, l])``."""

    out: Tensor
    activations: Tensor
    grad_outputs: Tensor
    tables: Sequence[Tensor]
    m: int
    route: str
    metric: Tensor | None = None


class LinearStepsCall(NamedTuple):
    """:class:`LinearCall` of each pair ``k``, added to ``out[rows[k] : rows[k] + n_k, steps[k]]``."""

    out: Tensor
    activations: Sequence[Tensor]
    grad_outputs: Sequence[Tensor]
    tables: Sequence[Tensor]
    m: int
    route: str
    steps: Sequence[int]
    rows: Sequence[int]
    metric: Tensor | None = None


class MatrixCall(NamedTuple):
    """``out[r] += TS(metric * grads[r])``."""

    out: Tensor
    grads: Tensor
    tables: Sequence[Tensor]
    m: int
    metric: Tensor | None = None


class EmbeddingCall(NamedTuple):
    """``out[r] += TS(sum_l onehot(token_ids[r, l]) (x) grad_outputs[r, l])``."""

    out: Tensor
    token_ids: Tensor
    grad_outputs: Tensor
    tables: Sequence[Tensor]
    m: int


class VectorCall(NamedTuple):
    """``out[r] += CS(sum_l grads[r, l])``."""

    out: Tensor
    grads: Tensor
    tables: Sequence[Tensor]
    m: int


class ScaledVectorCall(NamedTuple):
    """``out[r] += CS(sum_l grads[r, l] * (factors[r, l] - center[r, l]) * scale[r, l])``."""

    out: Tensor
    grads: Tensor
    factors: Tensor
    center: Tensor | None
    scale: Tensor | None
    tables: Sequence[Tensor]
    m: int
