"""A shard that is written a second time: whether it holds the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.attribution.sameness import features_differ, losses_differ
from stepinfluence.files import file_digest
from stepinfluence.store.codecs import decode, rounding_norm
from stepinfluence.store.manifest import Manifest
from stepinfluence.store.shards import Record, expected_arrays, map_arrays, values_path


def differ_by_rounding(
    store: Path, manifest: Manifest, before: Record, now: Record, arrays: Mapping[str, Tensor]
) -> bool:
    """Whether a shard that is there, whole, holds what is to be written, computed with other roundings: on another
    machine, or with another number of threads.

    Args:
        before: the record of the shard that is there.
        now, arrays: what is to be written.
    """
    path = values_path(store, before.checkpoint, before.shard)
    if before.failed != now.failed or not path.is_file() or file_digest(path) != before.files["values"][1]:
        return False
    old = map_arrays(path, expected_arrays(manifest, before))
    new = {name: array.view(torch.uint16) if array.dtype == torch.bfloat16 else array for name, array in arrays.items()}
    if any(not np.array_equal(old[name], new[name].numpy()) for name in ("steps", "lengths") if name in old):
        return False
    first = manifest.rows_of(before.shard).start
    good = np.setdiff1d(np.arange(len(old["losses"])), [failure.row - first for failure in now.failed])
    losses = [torch.from_numpy(old["losses"][good]), new["losses"][torch.from_numpy(good)]]
    values = [_rows(side, good, manifest) for side in (old, {name: array.numpy() for name, array in new.items()})]
    if values[0].shape != values[1].shape:
        return False
    eps = torch.finfo(torch.float32).eps
    stored = sum((rounding_norm(side, manifest.dtype) for side in values), torch.zeros(()))
    each = losses[0].view(-1, *(1,) * (stored.dim() - 1)).expand(stored.shape)
    rows = [side.flatten(0, -2) for side in values]
    differ = features_differ(rows[0], rows[1], each.flatten(), eps, stored.flatten())
    return not bool(losses_differ(losses[0], losses[1], eps).any() or differ.any())


def _rows(arrays: Mapping[str, npt.NDArray[Any]], places: npt.NDArray[np.int64], manifest: Manifest) -> Tensor:
    scales = arrays["scales"][places] if "scales" in arrays else None
    return decode(arrays["values"][places], scales, manifest.dtype)
