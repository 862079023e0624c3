"""Tensors that are spread over processes (DTensors), without importing ``torch.distributed`` where there are none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.errors import BodyError


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor; a plain tensor is all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def share_of(value: Any, own: Any) -> Any:
    """A value as it is put into a tensor of a model: of a sharded one, the part that is this process's."""
    if not is_sharded(own) or is_sharded(value) or not isinstance(value, Tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    given = value.to(own.device, own.dtype)
    return distribute_tensor(given, own.device_mesh, own.placements, src_data_rank=None)


def portion(tensor: Any) -> tuple[Tensor, int, bool]:
    """What this process has of a tensor's values, detached: (values, place of the first among all entries, whether
    other processes have the rest). Collective: where the part is no run of entries, the tensor is gathered."""
    data = tensor.detach()
    if not is_sharded(data):
        return data, 0, False
    if data.device_mesh.ndim == 1 and data.placements[0].is_shard(0) and type(data.placements[0]).__name__ == "Shard":
        rows = -(-data.shape[0] // data.device_mesh.size())
        before = min(data.shape[0], data.device_mesh.get_local_rank() * rows)
        return data.to_local(), before * (data.numel() // max(1, data.shape[0])), True
    return data.full_tensor(), 0, False


def add_portions(tensors: Sequence[Any], sums: Tensor) -> None:
    """Add up, over the processes that have the rest of a tensor, what each found of its portion.

    Args:
        tensors: what the sums are of.
        sums: ``(len(tensors), *)``, changed in place.
    """
    import torch.distributed as dist

    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault(tensor.device_mesh.get_group(), []).append(place)
    for group, places in groups.items():
        # The mesh's device, where parameters are kept elsewhere (offloaded).
        found = sums[places].to(tensors[places[0]].device_mesh.device_type)
        dist.all_reduce(found, group=group)
        sums[places] = found.to(sums.device)


def refuse_other_ways(model: nn.Module) -> None:
    """Refuse models that are spread over processes in a way that is not known.

    Raises:
        BodyError: names the way.
    """
    for what in _other_ways(model):
        raise BodyError(
            f"model: is spread over processes by {what}, which cannot be captured; use fully_shard (FSDP2) or "
            "tensor-parallel linear layers, or give every process the whole model (docs/scale.md)"
        )


def _other_ways(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__module__.startswith("torch.distributed.fsdp.") and kind.__name__ == "FullyShardedDataParallel":
                yield "FullyShardedDataParallel (FSDP1)"
            if kind.__module__.startswith("torch.distributed.pipelining"):
                yield "pipeline parallelism (torch.distributed.pipelining)"
            if kind.__module__.startswith("deepspeed"):
                yield "DeepSpeed"
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        yield "DeepSpeed ZeRO-3"


def data_pointer(tensor: Tensor) -> int:
    """Where a tensor's values lie; 0 for a tensor subclass without memory of its own."""
    try:
        return local(tensor).data_ptr()
    except RuntimeError:
        return 0


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as a tensor to reduce over processes."""
    return torch.tensor(values, dtype=torch.int64, device=device)
