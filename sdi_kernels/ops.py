"""``torch.library`` operators: fakes, autograd, device kernels.

For each kind of parameter there is one operator that accumulates into a buffer (``*_sketch_``: what device kernels
implement) and one that returns a new sketch (``*_sketch``: differentiable, built on the first). The default body is
plain torch, so every device works; faster kernels are registered for a device type on the accumulating operator only.

Canonical shapes: activations (rows, tokens, d_in), grad_outputs (rows, tokens, d_out), token_ids (rows, tokens),
grads (rows, tokens, d) for vectors and (rows, d_out, d_in) for matrices; metric (d_out, d_in) of the sketch's dtype;
sketches (rows, m). ``linear_steps_sketch`` takes lists of activations and grad_outputs, each with rows and tokens of
its own, and sketches are (rows, steps, m): pair k goes to its rows from ``rows[k]`` on, at ``steps[k]``. ``tables`` as
given by :meth:`TensorSketch.tables`. :mod:`sdi_kernels.calls` says what each operator takes, in order. The checked,
shape-polymorphic functions are in :mod:`sdi_kernels.functional`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sdi_kernels import borders, torch_routes
from sdi_kernels._checks import sketch_dtype
from sdi_kernels.calls import EmbeddingCall, LinearCall, LinearStepsCall, MatrixCall, ScaledVectorCall, VectorCall
from sdi_kernels.cpu import routes as cpu_routes
from sdi_kernels.workspace import workspace_bytes

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

# ---------------------------------------------------------------------------------------------------------------
# Accumulating operators: out += sketch(inputs)

Call = TypeVar("Call", LinearCall, LinearStepsCall, MatrixCall, EmbeddingCall, VectorCall, ScaledVectorCall)


def _schema(
    body: Callable[..., Any], kind: type, *, without: tuple[str, ...] = (), returns: type | None = None
) -> None:
    """Give ``body`` the signature that torch makes an operator's schema of: the fields of ``kind``."""
    fields = [p for name, p in inspect.signature(kind).parameters.items() if name not in without]
    body.__signature__ = inspect.Signature(fields, return_annotation=returns)  # type: ignore[attr-defined]


def guarded(kind: type[Call], check: Callable[[Call], None], run: Callable[[Call], None]) -> Callable[..., None]:
    """The body of an operator: its arguments as one call, checked and run."""

    def body(*arguments: Any, **options: Any) -> None:
        call = kind(*arguments, **options)
        check(call)
        run(call)

    _schema(body, kind)
    return body


def _accumulating(
    name: str,
    kind: type[Call],
    check: Callable[[Call], None],
    plain: Callable[[Call], None],
    on_cpu: Callable[[Call], None],
) -> CustomOpDef:
    """The operator that takes the fields of ``kind``: in plain torch, and with kernels for CPUs and GPUs."""

    def on_cuda(call: Call) -> None:
        from sdi_kernels.triton import launch  # when an operator first meets a CUDA tensor

        getattr(launch, name)(call)

    body = guarded(kind, check, plain)
    operator = torch.library.custom_op(f"sdi_kernels::{name}", body, mutates_args={"out"})
    # On the CPU: compiled kernels where they are built and apply, the same torch routes elsewhere.
    operator.register_kernel("cpu")(guarded(kind, check, on_cpu))
    operator.register_kernel("cuda")(guarded(kind, check, on_cuda))
    operator.register_fake(borders.on_one_device)
    return operator


linear_sketch_ = _accumulating("linear_sketch_", LinearCall, borders.linear, torch_routes.linear, cpu_routes.linear)
linear_steps_sketch_ = _accumulating(
    "linear_steps_sketch_", LinearStepsCall, borders.linear_steps, torch_routes.linear_steps, cpu_routes.linear_steps
)
matrix_sketch_ = _accumulating("matrix_sketch_", MatrixCall, borders.matrix, torch_routes.matrix, cpu_routes.matrix)
embedding_sketch_ = _accumulating(
    "embedding_sketch_", EmbeddingCall, borders.embedding, torch_routes.embedding, cpu_routes.embedding
)
vector_sketch_ = _accumulating("vector_sketch_", VectorCall, borders.vector, torch_routes.vector, cpu_routes.vector)
scaled_vector_sketch_ = _accumulating(
    "scaled_vector_sketch_",
    ScaledVectorCall,
    borders.scaled_vector,
    torch_routes.scaled_vector,
    cpu_routes.scaled_vector,
)


@linear_steps_sketch_.register_fake
def _(*arguments: Any) -> None:
    call = LinearStepsCall(*arguments)
    borders.linear_pairs(call.activations, call.grad_outputs, call.tables)
    borders.on_one_device(*arguments)
    borders.slots(call.steps, call.rows, call.activations, call.out.shape[:2])


def add_to(out: Tensor, operator: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Call one of the operators above with tensors that need no gradient.

    Torch's dispatcher takes its time for each of autograd's two keys (most of all with lists of a hundred tensors). For
    such tensors those have nothing to do but to count that ``out`` was written to.
    """
    if torch.compiler.is_compiling() or out.is_inference():
        operator(out, *arguments, **options)
        return
    with torch._C._AutoDispatchBelowADInplaceOrView():
        operator(out, *arguments, **options)
    torch.autograd.graph.increment_version(out)


# ---------------------------------------------------------------------------------------------------------------
# Functional operators: differentiable in activations and gradients


def _returning(name: str, kind: type, add: CustomOpDef, create: Callable[..., Tensor]) -> CustomOpDef:
    """The operator that takes the fields of ``kind`` but ``out``, and adds to a sketch that ``create`` makes."""

    def body(*arguments: Any, **options: Any) -> Tensor:
        out = create(*arguments, **options)
        add_to(out, add, *arguments, **options)
        return out

    _schema(body, kind, without=("out",), returns=Tensor)
    operator = torch.library.custom_op(f"sdi_kernels::{name}", body, mutates_args=())
    operator.register_fake(create)
    return operator


def _zeros(m: int, *inputs: Tensor) -> Tensor:
    return inputs[0].new_zeros(inputs[0].shape[0], m, dtype=sketch_dtype(*inputs))


def _of_pair(activations: Tensor, grad_outputs: Tensor, _tables: Sequence[Tensor], m: int, *_: Any) -> Tensor:
    return _zeros(m, activations, grad_outputs)


def _of_ids(_token_ids: Tensor, grad_outputs: Tensor, _tables: Sequence[Tensor], m: int) -> Tensor:
    return _zeros(m, grad_outputs)


def _of_grads(grads: Tensor, _tables: Sequence[Tensor], m: int, *_: Any) -> Tensor:
    return _zeros(m, grads)


linear_sketch = _returning("linear_sketch", LinearCall, linear_sketch_, _of_pair)
matrix_sketch = _returning("matrix_sketch", MatrixCall, matrix_sketch_, _of_grads)
embedding_sketch = _returning("embedding_sketch", EmbeddingCall, embedding_sketch_, _of_ids)
vector_sketch = _returning("vector_sketch", VectorCall, vector_sketch_, _of_grads)


@torch.library.custom_op("sdi_kernels::linear_steps_sketch", mutates_args=())
def linear_steps_sketch(
    activations: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    tables: Sequence[Tensor],
    m: int,
    route: str,
    steps: Sequence[int],
    rows: Sequence[int],
    size: Sequence[int],
    metric: Tensor | None = None,
) -> Tensor:
    if not activations or not grad_outputs or len(size) != 2:
        raise ValueError(
            f"size: got {size} for {len(activations)} pairs; pass rows and steps of the result, and a pair"
        )
    out = activations[0].new_zeros(*size, m, dtype=sketch_dtype(activations[0], grad_outputs[0]))
    add_to(out, linear_steps_sketch_, activations, grad_outputs, tables, m, route, steps, rows, metric)
    return out


@linear_steps_sketch.register_fake
def _(*arguments: Any) -> Tensor:
    activations, grad_outputs, tables, m, _, steps, rows, size, *_ = arguments
    borders.linear_pairs(activations, grad_outputs, tables)
    borders.slots(steps, rows, activations, size)
    out: Tensor = activations[0].new_empty(*size, m, dtype=sketch_dtype(activations[0], grad_outputs[0]))
    return out


# ---------------------------------------------------------------------------------------------------------------
# Autograd: sketches are linear in the gradient and bilinear in (activations, grad_outputs). A metric is a constant.

NO_TABLE_GRADS: list[None] = [None] * 6
"""What a backward returns for the list of the six tables of a TensorSketch: autograd wants the list's structure."""


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, grad_outputs, tables, _, _, metric = inputs
    ctx.save_for_backward(activations, grad_outputs, metric, *tables)


def _pair_backward(
    grad: Tensor, a: Tensor, delta: Tensor, tables: Sequence[Tensor], metric: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a pair of activations and output gradients, where needed, from ``grad``, (rows, m)."""
    rows = max(1, workspace_bytes(grad.device) // (2 * grad.element_size() * delta.shape[-1] * a.shape[-1]))
    grads_a, grads_g = [], []
    for g, some_a, some_delta in zip(grad.split(rows), a.split(rows), delta.split(rows), strict=True):
        weight = torch_routes.linear_adjoint(g, tables, grad.shape[-1])
        if metric is not None:
            weight = weight * metric.to(weight.dtype)
        if needs[0]:
            grads_a.append((some_delta.to(g.dtype) @ weight).to(a.dtype))
        if needs[1]:
            grads_g.append((some_a.to(g.dtype) @ weight.transpose(1, 2)).to(delta.dtype))
    return torch.cat(grads_a) if needs[0] else None, torch.cat(grads_g) if needs[1] else None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    activations, grad_outputs, metric, *tables = ctx.saved_tensors
    grads = _pair_backward(grad, activations, grad_outputs, tables, metric, ctx.needs_input_grad[:2])
    # As many as the call had arguments: torch does not count defaults that were left out.
    return (*grads, NO_TABLE_GRADS, None, None, None)[: len(ctx.needs_input_grad)]


def _linear_steps_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, grad_outputs, tables, _, _, ctx.steps, ctx.rows, _, metric = inputs
    ctx.save_for_backward(*activations, *grad_outputs, metric, *tables)


def _linear_steps_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    pairs = len(ctx.steps)
    saved = ctx.saved_tensors
    activations, grad_outputs, (metric, *tables) = saved[:pairs], saved[pairs : 2 * pairs], saved[2 * pairs :]
    found = [
        _pair_backward(grad[row : row + a.shape[0], step], a, g, tables, metric, needs)
        for a, g, step, row, *needs in zip(
            activations, grad_outputs, ctx.steps, ctx.rows, *ctx.needs_input_grad[:2], strict=True
        )
    ]
    grads_a, grads_g = ([pair[side] for pair in found] for side in (0, 1))
    return (grads_a, grads_g, NO_TABLE_GRADS, *[None] * 6)[: len(ctx.needs_input_grad)]


def _matrix_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grads, tables, ctx.m, metric = inputs
    ctx.dtype = grads.dtype
    ctx.save_for_backward(metric, *tables)


def _matrix_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    metric, *tables = ctx.saved_tensors
    weight = torch_routes.linear_adjoint(grad, tables, ctx.m)
    if metric is not None:
        weight = weight * metric.to(weight.dtype)
    return (weight.to(ctx.dtype), NO_TABLE_GRADS, None, None)[: len(ctx.needs_input_grad)]


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    token_ids, grad_outputs, tables, ctx.m = inputs
    ctx.dtype = grad_outputs.dtype
    ctx.save_for_backward(token_ids, *tables)


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    token_ids, h_out, s_out, _, h_in, s_in, _ = ctx.saved_tensors
    position = (h_out.long()[token_ids][..., None] + h_in.long()) % ctx.m
    picked = grad.gather(1, position.flatten(1)).view(position.shape)
    return None, (picked * (s_out[token_ids][..., None] * s_in).to(grad.dtype)).to(ctx.dtype), NO_TABLE_GRADS, None


def _vector_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grads, tables, _ = inputs
    ctx.dtype, ctx.shape = grads.dtype, grads.shape
    ctx.save_for_backward(*tables[:2])


def _vector_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bucket, sign = ctx.saved_tensors
    total = grad[:, bucket.long()] * sign.to(grad.dtype)
    return total[:, None].expand(ctx.shape).to(ctx.dtype), NO_TABLE_GRADS[:3], None


linear_sketch.register_autograd(_linear_backward, setup_context=_linear_setup)
linear_steps_sketch.register_autograd(_linear_steps_backward, setup_context=_linear_steps_setup)
matrix_sketch.register_autograd(_matrix_backward, setup_context=_matrix_setup)
embedding_sketch.register_autograd(_embedding_backward, setup_context=_embedding_setup)
vector_sketch.register_autograd(_vector_backward, setup_context=_vector_setup)
