"""Features and stores of known values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stepinfluence import Features, FeatureSpace
from stepinfluence.attribution.curvature import Progress
from stepinfluence.attribution.space import Block
from stepinfluence.store import Manifest, RowInfo, Store, StoredCheckpoint, StoreWriter
from stepinfluence.store.shards import FailedRow
from torch import Tensor

BLOCKS = (Block("core.weight", (4, 4), 0, 7), Block("core.bias", (4,), 7, 11), Block("norm.gain", (2,), 11, 13))
WIDTH = BLOCKS[-1].stop


def space(weights: str = "w0", tables: str = "t", blocks: Sequence[Block] = BLOCKS) -> FeatureSpace:
    return FeatureSpace("sketch", tuple(blocks), tables, weights)


def features(values: Tensor, *, prefix: str = "z", weights: str = "w0", blocks: Sequence[Block] = BLOCKS) -> Features:
    n = len(values)
    per_step = values.dim() == 3
    steps = values.shape[1] if per_step else 3
    return Features(
        values=values,
        losses=torch.ones(n),
        steps=torch.full((n,), steps),
        lengths=torch.full((n,), steps) if per_step else None,
        ids=tuple(f"{prefix}{i}" for i in range(n)),
        space=space(weights, blocks=blocks),
        step_labels=("core",) * steps,
    )


def small_integers(*shape: int, seed: int = 0, bound: int = 3) -> Tensor:
    """Whole numbers, whose inner products are exact in any order of summation and often equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-bound, bound + 1, shape, generator=generator).float()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def store(
    path: Path,
    checkpoints: Sequence[Features],
    *,
    etas: Sequence[float] = (1.0,),
    dtype: str = "fp32",
    shard_rows: int = 8,
    failed: Sequence[int] = (),
    progress: Sequence[Progress | str] = (),
    **fields: Any,
) -> Store:
    """A store of these features; rows in ``failed`` are written as failed."""
    first, known = checkpoints[0], progress or [""] * len(checkpoints)
    manifest = Manifest(
        checkpoints=tuple(
            StoredCheckpoint(f"c{k}", eta, f.space, one)
            for k, (f, eta, one) in enumerate(zip(checkpoints, etas, known, strict=True))
        ),
        n_rows=len(first),
        shard_rows=shard_rows,
        per_step=first.per_step,
        steps=first.values.shape[1] if first.per_step else None,
        dtype=dtype,
        **fields,
    )
    writer = StoreWriter.create(path, manifest)
    for k, all_rows in enumerate(checkpoints):
        for shard in writer.pending(k):
            rows = list(manifest.rows_of(shard))
            good = [r for r in rows if r not in failed]
            some = Features(
                values=all_rows.values[good],
                losses=all_rows.losses[good],
                steps=all_rows.steps[good],
                lengths=None if all_rows.lengths is None else all_rows.lengths[good],
                ids=tuple(all_rows.ids[r] for r in good),
                space=all_rows.space,
                step_labels=all_rows.step_labels,
            )
            infos = [RowInfo(str(all_rows.ids[r])) for r in rows]
            bad = [FailedRow(r, "loss is NaN") for r in rows if r in failed]
            writer.write_shard(k, shard, some if good else None, infos, bad)
    writer.finish()
    return Store.open(path)


def by_sorting(scores: Tensor, k: int, *, harmful: bool = False) -> list[list[int]]:
    """Top-k of every column of ``(n, C)`` by a full sort: larger score first, then the lower row."""
    sign = 1 if harmful else -1
    columns = scores.T.tolist()
    return [sorted(range(len(c)), key=lambda r, c=c: (sign * c[r], r))[:k] for c in columns]
