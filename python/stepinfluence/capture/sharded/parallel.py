"""Linear layers that tensor parallelism has spread over processes (``ColwiseParallel``, ``RowwiseParallel``).

Every process has some rows, or some columns, of a layer's weight. It sketches their gradient with these rows or columns
of the weight's hash tables; the sketch of the whole gradient is the sum over processes, one all-reduce of a batch's
features. What is not spread is computed by all of them alike, and counts once.

Such a layer is looked at from outside, where its input and output are plain tensors: what happens within, on DTensors,
runs unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from stepinfluence.capture.body.sources import Piece, Source
from stepinfluence.capture.body.steps import in_backward
from stepinfluence.capture.body.targets import Target
from stepinfluence.capture.sharded.company import Company
from stepinfluence.capture.uses.interceptor import Interceptor
from stepinfluence.errors import BodyError, UnsupportedUseError
from stepinfluence.shards import is_sharded, local

ALIKE = 1e-3
"""How far apart, relative to each other, the norms of a sketch may be that all processes make of the same gradient."""


@dataclass(frozen=True)
class ShardedLinear:
    """A linear layer of which this process has a part.

    Attributes:
        name, module: the layer.
        dim: of the weight along which it is cut: 0 for rows (``ColwiseParallel``), 1 for columns.
        part: which rows or columns are here.
        shape: of the whole weight.
    """

    name: str
    module: nn.Linear
    dim: int
    part: slice
    shape: tuple[int, int]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> ShardedLinear | None:
        """A layer's part, or None if it is not cut in a way that is known."""
        # As registered: a parametrized weight is computed when it is asked for, which may change the model's buffers.
        weight: Any = module._parameters.get("weight")
        if not isinstance(module, nn.Linear) or not is_sharded(weight) or weight.device_mesh.ndim != 1:
            return None
        (placement,) = weight.placements
        bias: Any = module._parameters.get("bias")
        if type(placement).__name__ != "Shard" or (bias is not None and not is_sharded(bias)):
            return None
        fits = bias is None or bias.placements[0].is_shard(0) == (placement.dim == 0)
        if not fits or (bias is not None and placement.dim == 1 and not bias.placements[0].is_replicate()):
            return None
        each = -(-weight.shape[placement.dim] // weight.device_mesh.size())
        first = min(weight.shape[placement.dim], each * weight.device_mesh.get_local_rank())
        count = local(weight.detach()).shape[placement.dim]
        return cls(name, module, placement.dim, slice(first, first + count), tuple(weight.shape))

    @property
    def mesh(self) -> Any:
        weight: Any = self.module.weight
        return weight.device_mesh

    def parameters(self) -> list[Tensor]:
        return [p for p in (self.module.weight, self.module.bias) if p is not None]

    def _here(self, values: Tensor, size: int) -> Tensor:
        """Features of the input or output, of which all ``size`` may be here: those that are this process's."""
        if values.shape[-1] == self.part.stop - self.part.start:
            return values
        if values.shape[-1] != size:
            raise self._refused(f"{values.shape[-1]} of {size} features are here, which is neither all nor a part")
        return values[..., self.part]

    def _refused(self, why: str) -> UnsupportedUseError:
        return UnsupportedUseError(
            f"{self.name}: is spread over processes in a way that cannot be captured ({why}); use ColwiseParallel and "
            "RowwiseParallel with plain tensors between layers, and no sequence parallelism"
        )

    def source(self, target: Target) -> Source:
        """This process's part of one of its parameters."""
        part, tensor = range(self.part.start, self.part.stop), target.parameter
        here = local(tensor.detach())
        if tensor.dim() == 1:
            columns = part if self.dim == 0 else range(tensor.shape[0])
            return Source(here, (target,), Piece(target, range(1), columns, False, 1))
        rows, columns = (range(n) for n in self.shape)
        rows, columns = (part, columns) if self.dim == 0 else (rows, part)
        return Source(here, (target,), Piece(target, rows, columns, False, 2))

    def tapped(self, it: Interceptor, call: Callable[..., Any], x: Tensor, sources: dict[int, Source]) -> Tensor:
        """The layer's output for an input, tapped where its parameters are targets."""
        weight, bias = sources.get(id(self.module.weight)), sources.get(id(self.module.bias))
        found = weight is not None or bias is not None
        if is_sharded(x):
            raise self._refused("its input is a DTensor")
        if not in_backward():
            it.owners.give([x])
        with torch._C.DisableTorchFunction(), _frozen(self.parameters() if found else []):
            y: Tensor = call(x)
            if is_sharded(y) or y.shape[:-1] != x.shape[:-1]:
                raise self._refused("its output is a DTensor, or has other rows than its input")
            y = y.clone()  # it may be on its way still, and its custom functions pass gradients on as they are
        if found:
            y = self._tap(it, x, y, weight, bias)
        if it.owners.following:
            it.owners.follower.follow(F.linear, (x, None), {}, y, [x], in_place=False, use=found)
        return y

    def _tap(self, it: Interceptor, x: Tensor, y: Tensor, weight: Source | None, bias: Source | None) -> Tensor:
        use = it.use(F.linear, it.owners.of(x, 1), weight, bias)
        d_out, d_in = self.shape

        def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
            data = saved[0] if self.dim == 0 else self._here(saved[0], d_in)
            ours = self._here(grad, d_out) if self.dim == 0 else grad
            if weight is not None:
                it.sink.linear(weight, use, data, ours)
            if bias is not None:
                it.sink.vector(bias, use, ours)

        return it.tap(y, use, receive, x)


@contextmanager
def _frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters take no part in autograd within this context."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class Parallel:
    """The tensor-parallel linear layers of a model.

    Args:
        model: unwrapped.
        but: identities of parameters that are sharded for another reason.
    """

    def __init__(self, model: nn.Module, but: Container[int] = ()) -> None:
        found = (
            ShardedLinear.of(name, module)
            for name, module in model.named_modules()
            if id(module._parameters.get("weight")) not in but
        )
        self._layers = [layer for layer in found if layer is not None]
        self._sources: dict[int, Source] = {}
        self._known = {id(p) for layer in self._layers for p in layer.parameters()}

    @property
    def any(self) -> bool:
        return bool(self._layers)

    @property
    def groups(self) -> list[Any]:
        """The process groups that layers are spread over."""
        return list(dict.fromkeys(layer.mesh.get_group() for layer in self._layers))

    def has(self, parameter: Tensor) -> bool:
        """Whether a parameter is one of theirs."""
        return id(parameter) in self._known

    def watch(self, targets: Sequence[Target], layout: str) -> None:
        """Tap the uses of these targets from now on.

        Raises:
            BodyError: the layers are spread over several groups of processes.
            ValueError: the layout has no columns for each parameter.
        """
        layers = {id(p): layer for layer in self._layers for p in layer.parameters()}
        self._sources = {id(t.parameter): layers[id(t.parameter)].source(t) for t in targets if self.has(t.parameter)}
        if self.any and len(self.groups) > 1:
            raise BodyError("model: its tensor-parallel layers are on several meshes; put all of them on one")
        if self.any and layout == "sum":
            raise ValueError("layout: got 'sum', which a tensor-parallel model cannot have; use 'concat'")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the passes of a run: layers are looked at from outside."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(self._looked_at(layer))
            yield

    @contextmanager
    def _looked_at(self, layer: ShardedLinear) -> Iterator[None]:
        call: Any = layer.module._call_impl

        def seen(*args: Any, **kwargs: Any) -> Any:
            modes = [m for m in _get_current_function_mode_stack() if isinstance(m, Interceptor)]
            if not modes or not torch.is_grad_enabled():
                return call(*args, **kwargs)
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                return call(*args, **kwargs)  # whatever that is, its results are not known
            return layer.tapped(modes[-1], call, args[0], self._sources)

        layer.module.__dict__["_call_impl"] = seen
        try:
            yield
        finally:
            del layer.module.__dict__["_call_impl"]

    def add_up(self, features: Tensor, blocks: Sequence[Any], company: Company) -> None:
        """Make the features of a batch ``(B, steps, D)`` or ``(B, D)`` from what each process has sketched, in place.

        Args:
            blocks: the columns of each parameter.

        Raises:
            BodyError: what all should have computed alike is not alike.
        """
        if not self.any or company.alone:
            return
        import torch.distributed as dist

        cut = (s.targets[0] for s in self._sources.values())
        sharded = {t.name for t in cut if not t.parameter.placements[0].is_replicate()}  # type: ignore[attr-defined]
        for block in blocks:
            if block.name in sharded:
                continue
            columns = features[..., block.start : block.stop]
            norm = float(columns.norm())
            highest, lowest = company.reach(norm)
            if highest - lowest > ALIKE * highest:
                raise BodyError(
                    f"{block.name}: its gradient differs between the processes of a tensor-parallel model "
                    f"(norms from {lowest:.4g} to {highest:.4g}): it is used on parts of the data, or batches differ; "
                    "give all of them the same batches, and leave out (requires_grad=False) what is used on parts"
                )
            if self._layers[0].mesh.get_local_rank():
                columns.zero_()
        whole = features.contiguous()
        dist.all_reduce(whole, group=self.groups[0])
        if whole is not features:
            features.copy_(whole)

    def same_batch(self, numbers: Sequence[int], company: Company) -> None:
        """All processes have the same batch.

        Args:
            numbers: that tell its examples (:func:`~stepinfluence.capture.body.batches.fingerprints`).

        Raises:
            BodyError: they have not.
        """
        if not self.any or company.alone:
            return
        mine = hash(tuple(numbers)) % 2**62
        if company.most(mine, -mine) != (mine, -mine):
            raise BodyError(
                "loader: the processes of a tensor-parallel model have different batches; give all of them the same"
            )
