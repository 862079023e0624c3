"""From the operators to the kernels: what ``register_kernel("cuda")`` calls.

Every function takes the call of its operator and adds to its ``out``. Where a kernel does not serve (Triton
missing, float64, a sketch size that :data:`transforms.FINISH` lacks), the plain-torch route does the same on the GPU.
Triton is imported on the first call, not before; it launches on the current device, so the tensors' is made that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdi_kernels import torch_routes
from sdi_kernels.calls import EmbeddingCall, LinearCall, LinearStepsCall, MatrixCall, ScaledVectorCall, VectorCall
from sdi_kernels.triton import available, common


def _linear(call: LinearCall | LinearStepsCall) -> Callable[[Any], None] | None:
    """The kernel's launcher that serves the call's route for inputs of its dtypes; None where the torch route does.

    ``direct`` and ``shear`` add with float atomics: under ``torch.use_deterministic_algorithms`` ``fft`` stands in for
    them, or the torch route where there is a ``metric``.
    """
    pair = call.activations, call.grad_outputs
    if not available() or not common.supported(*(x if isinstance(x, Tensor) else x[0] for x in pair)):
        return None
    from sdi_kernels.triton import direct, fft, shear, transforms

    deterministic = torch.are_deterministic_algorithms_enabled()
    if call.metric is None and (call.route == "fft" or deterministic) and call.m in transforms.FINISH:
        return fft.linear_fft
    if call.route == "fft" or deterministic:
        return None
    return shear.linear_shear if call.route == "shear" and call.metric is None else direct.linear_direct


def linear_sketch_(call: LinearCall) -> None:
    if kernel := _linear(call):
        with torch.cuda.device(call.out.device):
            kernel(call)
    else:
        torch_routes.linear(call)


def linear_steps_sketch_(call: LinearStepsCall) -> None:
    """All pairs by one launch, and by one more to finish ``fft``."""
    if kernel := _linear(call):
        with torch.cuda.device(call.out.device):
            kernel(call)
    else:
        torch_routes.linear_steps(call)


def matrix_sketch_(call: MatrixCall) -> None:
    if available() and common.supported(call.grads):
        from sdi_kernels.triton import matrix

        with torch.cuda.device(call.out.device):
            matrix.matrix(call)
    else:
        torch_routes.matrix(call)


def embedding_sketch_(call: EmbeddingCall) -> None:
    if available() and common.supported(call.grad_outputs):
        from sdi_kernels.triton import embedding

        with torch.cuda.device(call.out.device):
            embedding.embedding(call)
    else:
        torch_routes.embedding(call)


def vector_sketch_(call: VectorCall) -> None:
    if available() and common.supported(call.grads):
        from sdi_kernels.triton import vector

        with torch.cuda.device(call.out.device):
            vector.vector(call)
    else:
        torch_routes.vector(call)


def scaled_vector_sketch_(call: ScaledVectorCall) -> None:
    if available() and common.supported(call.grads, call.factors):
        from sdi_kernels.triton import vector

        with torch.cuda.device(call.out.device):
            vector.vector(call)
    else:
        torch_routes.scaled_vector(call)
