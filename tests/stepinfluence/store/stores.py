"""Small stores of made-up features, each shard a function of its numbers alone, as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.space import Block, FeatureSpace
from stepinfluence.store import FailedRow, Manifest, RowInfo, Store, StoredCheckpoint, StoreWriter

WIDTH = 11
BLOCKS = (Block("w", (3, 4), 0, 8), Block("b", (3,), 8, WIDTH))
FAILED = {6: "loss is NaN"}
TIMES = "times.jsonl"


def space(checkpoint: int = 0, **fields: Any) -> FeatureSpace:
    return FeatureSpace(
        "sketch", fields.pop("blocks", BLOCKS), fields.pop("tables", "t"), f"weights {checkpoint}", **fields
    )


def manifest(n_rows: int = 14, shard_rows: int = 4, checkpoints: int = 2, **fields: Any) -> Manifest:
    given = [StoredCheckpoint(f"step-{k}.pt", 0.1 * (k + 1), space(k)) for k in range(checkpoints)]
    return Manifest(tuple(given), n_rows, shard_rows, **fields)


def rows(made: Manifest, shard: int) -> list[RowInfo]:
    return [RowInfo(f"example {row}", f"line\n{row} \u2028 é", {"label": row}) for row in made.rows_of(shard)]


def features(made: Manifest, checkpoint: int, shard: int) -> Features:
    """Of the shard's rows that do not fail; odd shards run one loop step more."""
    n = sum(row not in FAILED for row in made.rows_of(shard))
    steps = 2 + shard % 2
    generator = torch.Generator().manual_seed(1000 * checkpoint + shard)
    shape = (n, steps, made.width) if made.per_step else (n, made.width)
    return Features(
        values=torch.randn(shape, generator=generator) * 3,
        losses=torch.rand(n, generator=generator),
        steps=torch.full((n,), steps),
        lengths=torch.full((n,), steps - 1) if made.per_step else None,
        ids=tuple(range(n)),
        space=made.checkpoints[checkpoint].space,
        step_labels=("core",) * steps,
    )


def write(path: Path, made: Manifest, log: Path | None = None) -> None:
    """Begin a store or go on with it, to the end; ``log`` gets a line for every shard that is begun."""
    writer = StoreWriter.create(path, made)
    for checkpoint in range(len(made.checkpoints)):
        for shard in writer.pending(checkpoint):
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{checkpoint} {shard}\n")
            failed = [FailedRow(row, why) for row, why in FAILED.items() if row in made.rows_of(shard)]
            writer.write_shard(
                checkpoint, shard, features(made, checkpoint, shard), rows(made, shard), failed, seconds=0.5
            )
    writer.finish()


def written(path: Path, made: Manifest | None = None) -> Store:
    write(path, made or manifest())
    return Store.open(path)


def content(path: Path) -> dict[str, bytes]:
    """Every file of a store but the log of times."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != TIMES}
