"""Time and memory of fitting a Fisher to a large store, and of asking with it.

    python -m bench.curvature_cost --scratch DIR                  # 1e5 rows of 48 x 2048 columns: 10 GB in int8
    python -m bench.curvature_cost --scratch DIR --rows 20000
    python -m bench.curvature_cost --scratch DIR --keep           # kept: docs/curvature.md states its figures

Rows are 256 directions whose sizes fall as 1/k, and noise of a tenth of a row's length: what costs is their number, not
what they say. Each kind is fitted in a fresh process, which tells its peak memory; ``auto`` damping is chosen, which
takes two passes more. Queries are transformed by step, then the store is scanned with them summed, with and without
curvature in turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from stepinfluence import BlockFisher, Features, FeatureSpace, Fisher
from stepinfluence.attribution.curvature.choice import KINDS
from stepinfluence.attribution.space import Block
from stepinfluence.progress import tqdm
from stepinfluence.search import ask
from stepinfluence.search.topk import best_rows
from stepinfluence.store import Manifest, RowInfo, Store, StoredCheckpoint, StoreWriter

from bench.provenance import Provenance, add_output, machine_line, machine_slug, write

SHARD_ROWS, DIRECTIONS, NOISE = 2048, 256, 0.1
QUERIES, STEPS, K, ROUNDS = 32, 16, 10, 3


def space_of(parameters: int, m: int) -> FeatureSpace:
    """Of sketches of square matrices."""
    blocks = tuple(Block(f"layer.{k}.weight", (768, 768), k * m, (k + 1) * m) for k in range(parameters))
    return FeatureSpace("sketch", blocks, "made", "made")


def rows_of(count: int, width: int, seed: int) -> torch.Tensor:
    """``(count, width)`` rows; the directions are the same for every seed."""
    directions = torch.randn(DIRECTIONS, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    generator = torch.Generator().manual_seed(1 + seed)
    sizes = 1 / torch.arange(1, DIRECTIONS + 1)
    rows = torch.randn(count, DIRECTIONS, generator=generator).mul_(sizes) @ directions
    noise = torch.randn(count, width, generator=generator)
    return rows.add_(noise.mul_(NOISE * rows.norm(dim=1, keepdim=True) / width**0.5))


def stored(path: Path, rows: int, space: FeatureSpace) -> Store:
    """A store of ``rows`` rows in int8, summed over steps."""
    manifest = Manifest(
        checkpoints=(StoredCheckpoint("made", 1.0, space),), n_rows=rows, shard_rows=SHARD_ROWS, dtype="int8"
    )
    writer = StoreWriter.create(path, manifest)
    for first in tqdm(range(0, rows, SHARD_ROWS), desc="rows written", unit="shard"):
        n = min(SHARD_ROWS, rows - first)
        values, ids = rows_of(n, space.width, first), range(first, first + n)
        # Losses that depend on the rows, so that there is something for a damping to predict.
        losses = values[:, :64].sum(1).abs()
        part = Features(values, losses, torch.full((n,), STEPS), None, tuple(ids), space)
        writer.write_shard(0, first // SHARD_ROWS, part, [RowInfo(r) for r in ids])
    writer.finish()
    return Store.open(path)


def queries_of(space: FeatureSpace) -> Features:
    """By step."""
    values = rows_of(QUERIES * STEPS, space.width, -1).view(QUERIES, STEPS, -1)
    return Features(values, torch.ones(QUERIES), torch.full((QUERIES,), STEPS), None, tuple(range(QUERIES)), space)


def measured(path: Path, kind: str) -> dict[str, Any]:
    """Fit one kind and ask with it; of this process."""
    store = Store.open(path)
    query = queries_of(store.checkpoints[0].space)
    before = peak_gib()
    began, busy = time.perf_counter(), time.process_time()
    fitted = KINDS[kind].fit(store)
    wall, cpu = time.perf_counter() - began, time.process_time() - busy
    fit_peak = peak_gib()
    began = time.perf_counter()
    asked = fitted.transform(query)  # by step: what a query costs once
    applied = time.perf_counter() - began
    scans: dict[str, list[float]] = {"plain": [], "corrected": []}
    for _ in range(ROUNDS):
        for name, side in (("plain", query), ("corrected", asked)):
            question = ask(store, side.summed())
            began = time.perf_counter()
            best_rows(question, K, progress=False)
            scans[name].append(time.perf_counter() - began)
    return {
        "kind": kind,
        "fit s": wall,
        "fit cpu s": cpu,
        "peak GiB before": before,
        "peak GiB": fit_peak,
        "eigenvectors": sum(len(factor.values) for factor in fitted.factors),
        "damping": fitted.damping,
        "apply s": applied,
        "scan s": {name: min(seconds) for name, seconds in scans.items()},
    }


def peak_gib() -> float:
    """The largest resident set of this process so far. A store's mapped pages count as long as they are resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--parameters", type=int, default=48)
    parser.add_argument("--m", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", choices=(Fisher.kind, BlockFisher.kind), default=[*KINDS])
    parser.add_argument("--scratch", type=Path, required=True, help="a folder with room for one byte a value")
    parser.add_argument("--one", choices=(*KINDS,), help=argparse.SUPPRESS)
    add_output(parser, f"curvature-cost-{machine_slug()}")
    args = parser.parse_args()
    path = args.scratch / f"curvature-{args.rows}-{args.parameters}-{args.m}"
    if args.one:
        print(json.dumps(measured(path, args.one)))
        return
    provenance = Provenance()
    began = time.perf_counter()
    store = stored(path, args.rows, space_of(args.parameters, args.m))
    size = sum(codes.nbytes for _, codes, _ in store.raw_blocks()) / 1e9
    print(f"{args.rows} rows of {args.parameters} x {args.m}: {size:.1f} GB in {time.perf_counter() - began:.0f} s")
    found = []
    try:
        for kind in args.kinds:
            given = [
                f"--rows={args.rows}",
                f"--parameters={args.parameters}",
                f"--m={args.m}",
                f"--scratch={args.scratch}",
            ]
            command = [sys.executable, "-m", "bench.curvature_cost", *given, "--one", kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(found[-1], flush=True)
    finally:
        shutil.rmtree(path)
    print(machine_line(provenance.finish()))
    facts = {"rows": args.rows, "parameters": args.parameters, "m": args.m, "gigabytes": size}
    write(args.json, provenance, {**facts, "queries": QUERIES, "steps": STEPS, "kinds": found})


if __name__ == "__main__":
    main()
