"""From the operators to the kernels: what ``register_kernel("cuda")`` calls.

Every function takes the canonical arguments of its operator and adds to ``out``. Where a kernel does not serve (Triton
missing, float64, a sketch size that :data:`transforms.FINISH` lacks), the plain-torch route does the same on the GPU.
Triton is imported on the first call, not before; it launches on the current device, so the tensors' is made that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdi_kernels import torch_routes
from sdi_kernels.triton import available, common


def _linear(
    out: Tensor, first: tuple[Tensor, Tensor], m: int, route: str, metric: Tensor | None
) -> Callable[..., None] | None:
    """The kernel's launcher that serves ``route`` for inputs of these dtypes; None where the torch route does.

    ``direct`` and ``shear`` add with float atomics: under ``torch.use_deterministic_algorithms`` ``fft`` stands in for
    them, or the torch route where there is a ``metric``.
    """
    if not available() or not common.supported(*first):
        return None
    from sdi_kernels.triton import direct, fft, shear, transforms

    deterministic = torch.are_deterministic_algorithms_enabled()
    if metric is None and (route == "fft" or deterministic) and m in transforms.FINISH:
        return fft.linear_fft
    if route == "fft" or deterministic:
        return None
    if metric is not None:
        return functools.partial(direct.linear_direct, metric=metric)
    return shear.linear_shear if route == "shear" else direct.linear_direct


def linear_sketch_(
    out: Tensor,
    activations: Tensor,
    grad_outputs: Tensor,
    tables: Sequence[Tensor],
    m: int,
    route: str,
    metric: Tensor | None = None,
) -> None:
    if activations.shape[0] == 0 or activations.shape[1] == 0:
        return
    if kernel := _linear(out, (activations, grad_outputs), m, route, metric):
        with torch.cuda.device(out.device):
            kernel(out, activations, grad_outputs, tables, m)
    else:
        torch_routes.linear(out, activations, grad_outputs, tables, m, route, metric)


def linear_steps_sketch_(
    out: Tensor,
    activations: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    tables: Sequence[Tensor],
    m: int,
    route: str,
    steps: Sequence[int],
    rows: Sequence[int],
    metric: Tensor | None = None,
) -> None:
    """All pairs by one launch, and by one more to finish ``fft``."""
    if kernel := _linear(out, (activations[0], grad_outputs[0]), m, route, metric):
        with torch.cuda.device(out.device):
            kernel(out, activations, grad_outputs, tables, m, steps=steps, rows=rows)
    else:
        torch_routes.linear_steps(out, activations, grad_outputs, tables, m, route, steps, rows, metric)


def matrix_sketch_(out: Tensor, grads: Tensor, tables: Sequence[Tensor], m: int, metric: Tensor | None = None) -> None:
    if available() and common.supported(grads):
        from sdi_kernels.triton import matrix

        with torch.cuda.device(out.device):
            matrix.matrix(out, grads, tables, m, metric=metric)
    else:
        torch_routes.matrix(out, grads, tables, m, metric)


def embedding_sketch_(out: Tensor, token_ids: Tensor, grad_outputs: Tensor, tables: Sequence[Tensor], m: int) -> None:
    if available() and common.supported(grad_outputs):
        from sdi_kernels.triton import embedding

        with torch.cuda.device(out.device):
            embedding.embedding(out, token_ids, grad_outputs, tables, m)
    else:
        torch_routes.embedding(out, token_ids, grad_outputs, tables, m)


def vector_sketch_(out: Tensor, grads: Tensor, tables: Sequence[Tensor], m: int) -> None:
    if available() and common.supported(grads):
        from sdi_kernels.triton import vector

        with torch.cuda.device(out.device):
            vector.vector(out, grads, tables, m)
    else:
        torch_routes.vector(out, grads, tables, m)


def scaled_vector_sketch_(
    out: Tensor,
    grads: Tensor,
    factors: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    tables: Sequence[Tensor],
    m: int,
) -> None:
    if available() and common.supported(grads, factors):
        from sdi_kernels.triton import vector

        with torch.cuda.device(out.device):
            vector.vector(out, grads, tables, m, factors=factors, center=center, scale=scale)
    else:
        torch_routes.scaled_vector(out, grads, factors, center, scale, tables, m)
