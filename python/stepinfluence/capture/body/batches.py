"""What can be told of a batch before the model has seen it: its examples, and how many a loader gives."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def leaves(batch: Any) -> Iterator[Any]:
    """Everything in a batch that is no container: of mappings, sequences, dataclasses, and objects with tensors as
    attributes."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, list | tuple | set):
        for value in batch:
            yield from leaves(value)
    elif isinstance(batch, Tensor | str | bytes | int | float | type | None):
        yield batch
    elif dataclasses.is_dataclass(batch):
        for entry in dataclasses.fields(batch):
            yield from leaves(getattr(batch, entry.name))
    elif any(isinstance(value, Tensor) for value in getattr(batch, "__dict__", {}).values()):
        for value in vars(batch).values():
            yield from leaves(value)
    else:
        parts = pytree.tree_leaves(batch)  # containers that were registered with torch
        yield from parts if len(parts) != 1 or parts[0] is not batch else [batch]


def infer_batch_size(batch: Any, batch_dim: int = 0) -> int | None:
    """Number of examples of a batch: the size that its tensors share at ``batch_dim`` (None if they disagree, or there
    are none)."""
    tensors = [t for t in leaves(batch) if isinstance(t, Tensor) and not t.is_nested]
    sizes = {t.shape[batch_dim] for t in tensors if t.dim() > batch_dim}
    return sizes.pop() if len(sizes) == 1 else None


def settled_size(batch: Any, batch_dim: int, losses: Any) -> int | None:
    """:func:`infer_batch_size`, or the number of losses where a list in the batch has that many tensors: one for each
    example, which are all of one length by chance."""
    size = infer_batch_size(batch, batch_dim)
    if not isinstance(losses, Tensor) or losses.dim() != 1 or size in (None, len(losses)):
        return size
    return len(losses) if any(len(found) == len(losses) for found in _lists_of_tensors(batch)) else size


def _lists_of_tensors(batch: Any) -> Iterator[list[Tensor] | tuple[Tensor, ...]]:
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from _lists_of_tensors(value)
    elif isinstance(batch, list | tuple):
        if all(isinstance(value, Tensor) for value in batch):
            yield batch
        for value in batch:
            yield from _lists_of_tensors(value)


def usable(batch: Any) -> Any:
    """The batch, with copies of tensors that were made under ``torch.inference_mode``: those cannot be saved for a
    backward pass."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, batch)


def length_of(loader: Any) -> int | None:
    """``len(loader)``, or None for streams: they have no such method, or one that raises."""
    try:
        length: int = len(loader)
        return length
    except (TypeError, NotImplementedError, AttributeError):
        return None


def expected_rows(loader: Any) -> int:
    """How many examples a loader will give, as far as it tells (0 if it does not)."""
    for value in (getattr(loader, "dataset", None), loader):
        if value is not None and (length := length_of(value)) is not None:
            return length
    return 0


def fingerprints(batch: Any, size: int, batch_dim: int = 0) -> list[int]:
    """A number per example, from what the batch holds of it: equal for equal examples at the same place. Tells batches
    in another order, without a copy of them; whatever has no row per example counts for all alike."""
    rows = torch.zeros(size, dtype=torch.int64)
    shared = 0
    for place, leaf in enumerate(leaves(batch)):
        factor = 2 * place + 1
        if isinstance(leaf, Tensor) and _is_plain(leaf):
            found = _sums(leaf, batch_dim if leaf.dim() > batch_dim else 0).cpu()
            if len(found) == size:
                rows += factor * found
            else:
                shared += factor * int((found * torch.arange(1, len(found) + 1)).sum())
        elif isinstance(leaf, str | bytes | int | float):
            shared += factor * zlib.crc32(leaf if isinstance(leaf, bytes) else repr(leaf).encode())
    return [(int(row) + shared) % 2**63 for row in rows]


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and tensor.dim() > 0 and tensor.numel() > 0


def _sums(tensor: Tensor, dim: int) -> Tensor:
    """Sums of the bits of each row along ``dim``."""
    rows = tensor.detach().resolve_conj().resolve_neg().movedim(dim, 0).contiguous()
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    if rows.dtype != torch.bool:
        rows = rows.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    return rows.reshape(len(rows), -1).sum(1, dtype=torch.int64)
