"""Featurize, store, search and throw away, for as long as asked: does memory stay flat, does anything leak?

    python -m bench.soak --minutes 60 --out soak

Writes ``soak.json`` and ``soak.png`` (resident memory against time). Exit status 1 if memory grew by more than
``--allow`` MiB between the first and the last quarter of the run (without its first tenth, in which caches fill), or if
hooks, open files, threads or processes were left over.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from stepinfluence import attach
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.search import top_k
from stepinfluence.store import Manifest, RowInfo, Store, StoreWriter, checkpoint_of
from torch import nn

from bench.provenance import Provenance, write

ROWS = 96


@dataclass(frozen=True)
class Held:
    """What a process holds on to; what of it must not grow. None: this system does not tell."""

    hooks: int
    files: int | None
    threads: int
    children: int | None


def held(model: nn.Module) -> Held:
    """Now. Files and children are known on Linux only."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    descriptors, task = Path("/proc/self/fd"), Path(f"/proc/self/task/{os.getpid()}/children")
    return Held(
        hooks=hooks,
        files=len(list(descriptors.iterdir())) if descriptors.is_dir() else None,
        threads=threading.active_count(),
        children=len(task.read_text().split()) if task.is_file() else None,
    )


def resident() -> int | None:
    """Resident memory in bytes; None where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else None


def one_round(model: nn.Module, folder: Path) -> None:
    """Attach anew, featurize both sides, store, verify that search finds something, forget."""
    problem = PROBLEM
    capture = attach(model, body=model.core, sketch_size=512)
    query = capture.featurize(problem.batches("query"), problem.loss, progress=False)
    checkpoint = checkpoint_of(capture, "soak", 1.0)
    writer = StoreWriter.create(folder / "train", Manifest((checkpoint,), ROWS, 32))
    for shard in writer.pending(0):
        rows = writer.manifest.rows_of(shard)
        batch = problem.collate([problem.train[r] for r in rows])
        features = capture.featurize([batch], problem.loss, per_step=False, progress=False)
        writer.write_shard(0, shard, features, [RowInfo(r, f"row {r}", {}) for r in rows], [])
    writer.finish()
    found = top_k(Store.open(folder / "train"), query, 3, progress=False)
    assert found.rows.min() >= 0


PROBLEM = make_problem("majority", n_train=ROWS, n_query=16, updates=5)


Measured: TypeAlias = list[tuple[float, int | None]]
"""(seconds since the start, resident bytes or None) after each round."""


def soak(seconds: float, *, least_rounds: int = 1) -> tuple[Measured, Held, Held]:
    """Rounds for some time; what was measured after each, and what was held before and after."""
    model = PROBLEM.untrained(0)
    measured: Measured = []
    began = time.monotonic()
    before: Held | None = None
    while time.monotonic() - began < seconds or len(measured) < least_rounds:
        with tempfile.TemporaryDirectory() as folder:
            one_round(model, Path(folder))
        gc.collect()
        measured.append((time.monotonic() - began, resident()))
        before = before or held(model)  # after one round: lazy imports and pools are there
    assert before is not None
    return measured, before, held(model)


def growth(measured: Measured) -> float | None:
    """MiB by which the median of the last quarter exceeds that of the first, after the first tenth; None if memory
    could not be read."""
    known = [v for _, v in measured[len(measured) // 10 :] if v is not None]
    if not known:
        return None
    values = np.array(known, dtype=float) / 2**20
    quarter = max(1, len(values) // 4)
    return float(np.median(values[-quarter:]) - np.median(values[:quarter]))


def draw(measured: Measured, path: Path) -> None:
    from reproduce.style import figure, styled

    with styled():
        made, axes = figure(width=8, height=3)
        known = [(t / 60, v / 2**20) for t, v in measured if v is not None]
        axes.plot([t for t, _ in known], [v for _, v in known])
        axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
        made.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--allow", type=float, default=16, help="MiB of growth")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="path of the files, without suffix")
    options = parser.parse_args()
    torch.set_num_threads(1)
    provenance = Provenance()
    measured, before, after = soak(60 * options.minutes)
    grown = growth(measured)
    result = {
        "minutes": options.minutes,
        "rounds": len(measured),
        "growth_mib": grown,
        "held_before": vars(before),
        "held_after": vars(after),
        "resident_mib": [
            None if v is None else round(v / 2**20, 1) for _, v in measured[:: max(1, len(measured) // 500)]
        ],
    }
    write(options.out.with_suffix(".json"), provenance, result)
    draw(measured, options.out.with_suffix(".png"))
    grew = "n/a" if grown is None else f"{grown:+.1f} MiB"
    print(f"{len(measured)} rounds in {options.minutes:g} minutes; memory grew by {grew}; held {after}")
    return int((grown is not None and grown > options.allow) or after != before)


if __name__ == "__main__":
    sys.exit(main())
