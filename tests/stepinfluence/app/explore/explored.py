"""A small run with texts that try to break out of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.space import Block, FeatureSpace
from stepinfluence.store import FailedRow, Manifest, RowInfo, SketchSpec, StoredCheckpoint, StoreWriter

STEPS = 6
BLOCKS = (Block("core.<b>w</b>", (4, 4), 0, 8), Block("core.b", (4,), 8, 12))
SKETCH = SketchSpec({"core.<b>w</b>": 8, "core.b": 4}, "balanced", 0)
HOSTILE = (
    "<script>document.title='hacked'</script>",
    "</script><img src=x onerror=\"document.title='hacked'\">",
    "\u202eright to left\u202c and \u0007bell",
    "a" * 1_000_000,
    "{{ 7*7 }} ${7*7} &lt;b&gt;",
    '=HYPERLINK("http://x")',
)
FAILED = 7


def space(checkpoint: int) -> FeatureSpace:
    return FeatureSpace("sketch", BLOCKS, "tables", f"weights {checkpoint}")


def write_split(
    path: Path,
    n: int,
    *,
    per_step: bool,
    seed: int,
    failed: int | None = None,
    checkpoints: int = 2,
    etas: tuple[float, ...] = (0.1, 0.2),
    texts: Sequence[str] = HOSTILE,
    shard_rows: int = 16,
    depths: bool = False,
) -> None:
    """``depths``: row r takes ``1 + r % STEPS`` steps, instead of all."""
    stored = tuple(StoredCheckpoint(f"step-{k}.pt", etas[k], space(k)) for k in range(checkpoints))
    manifest = Manifest(stored, n, shard_rows, per_step=per_step, steps=STEPS if per_step else None, sketch=SKETCH)
    writer = StoreWriter.create(path, manifest)
    for k in range(checkpoints):
        for shard in writer.pending(k):
            rows = manifest.rows_of(shard)
            kept = [r for r in rows if r != failed]
            generator = torch.Generator().manual_seed(1000 * seed + 100 * k + shard)
            shape = (len(kept), STEPS, 12) if per_step else (len(kept), 12)
            taken = torch.tensor([1 + r % STEPS if depths else STEPS for r in kept])
            values = torch.randn(shape, generator=generator)
            if per_step:
                values[torch.arange(STEPS) >= taken[:, None]] = 0
            features = Features(
                values=values,
                losses=torch.rand(len(kept), generator=generator),
                steps=torch.full((len(kept),), STEPS),
                lengths=taken if per_step else None,
                ids=tuple(kept),
                space=space(k),
                step_labels=("core",) * STEPS,
            )
            infos = [RowInfo(f"id {r}", texts[r % len(texts)], metadata(r), tokens(r)) for r in rows]
            failures = [FailedRow(r, "loss is NaN") for r in rows if r == failed]
            writer.write_shard(k, shard, features, infos, failures)
    writer.finish()


def metadata(row: int) -> dict[str, Any]:
    return {"<i>label</i>": row % 3} if row % 2 else {"label": row % 3}


def tokens(row: int) -> list[str] | None:
    return ["<b>", "tok", "\u202e"] if row % 2 else None


def write_run(path: Path, *, train_per_step: bool = True) -> Path:
    write_split(path / "train", 40, per_step=train_per_step, seed=1, failed=FAILED)
    write_split(path / "test", 9, per_step=True, seed=2, failed=FAILED)
    return path
