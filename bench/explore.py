"""How long a click in the explorer takes on a large run.

    python -m bench.explore --scratch DIR [--rows 1000000] [--queries 20000] [--columns 1024] [--steps 8] [--keep]

The run is synthetic: rows of normal numbers in int8, one checkpoint, ids, and texts of ten words. Its files lie in the
page cache. A click is what the page asks its server for, of queries and examples that nothing is kept of yet; a first
query, which maps the files, is not timed. The median of ``--rounds`` is shown, in seconds of the wall's clock and of
the processor: on a machine that others use the latter says more.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stepinfluence.app.view.explore import Explorer
from stepinfluence.app.view.explore.questions import questions_of
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.space import Block, FeatureSpace
from stepinfluence.store import Manifest, RowInfo, SketchSpec, StoredCheckpoint, StoreWriter

from bench.provenance import Provenance, add_output, machine_line, machine_slug, write

SHARD_ROWS = 32_768
WORDS = ("anna", "lives", "in", "paris", "is", "from", "and", "likes", "the", "river", "behind", "her", "house")


def written(path: Path, rows: int, *, columns: int, steps: int, seed: int) -> None:
    """A store of a split; per step if it has steps."""
    space = FeatureSpace("sketch", (Block("core.weight", (columns, columns), 0, columns),), "tables", "weights")
    shard_rows = SHARD_ROWS if not steps else 1024
    manifest = Manifest(
        (StoredCheckpoint("step-1", 0.1, space),),
        rows,
        shard_rows,
        per_step=steps > 0,
        steps=steps or None,
        dtype="int8",
        sketch=SketchSpec({"core.weight": columns}, "balanced", 0),
    )
    writer = StoreWriter.create(path, manifest)
    for shard in writer.pending(0):
        numbers, generator = manifest.rows_of(shard), torch.Generator().manual_seed(1000 * seed + shard)
        n = len(numbers)
        shape = (n, steps, columns) if steps else (n, columns)
        features = Features(
            values=torch.randn(shape, generator=generator),
            losses=torch.rand(n, generator=generator),
            steps=torch.full((n,), steps or 1),
            lengths=torch.full((n,), steps) if steps else None,
            ids=tuple(numbers),
            space=space,
            step_labels=("core",) * steps,
        )
        writer.write_shard(0, shard, features, [RowInfo(f"id {r}", text_of(r)) for r in numbers])
    writer.finish()


def text_of(row: int) -> str:
    """Ten words and the row's number."""
    return " ".join(WORDS[(row * (k + 3) + k) % len(WORDS)] for k in range(10)) + f" {row}"


def timed(work: Callable[[int], object], rounds: int) -> dict[str, float]:
    """Median seconds of some rounds, each of which does other work."""
    wall, processor = [], []
    for k in range(rounds):
        began, used = time.perf_counter(), time.process_time()
        work(k)
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    return {"wall s": statistics.median(wall), "processor s": statistics.median(processor)}


def clicks(explorer: Explorer, rounds: int) -> dict[str, dict[str, float]]:
    """Every click, by what is chosen."""
    ask = {
        name: lambda _name=name, **fields: questions_of(explorer)[_name](_text(fields))
        for name in questions_of(explorer)
    }
    first = iter(range(1, len(explorer.query)))
    queries = [[next(first) for _ in range(rounds)] for _ in range(3)]

    def query(row: int) -> None:
        ask["example"](side="query", row=row)
        ask["curve"](query=row)
        ask["top"](query=row)

    query(0)
    train = len(explorer.train)
    return {
        "a query": timed(lambda k: query(queries[0][k]), rounds),
        "other steps of it": timed(
            lambda k: ask["top"](query=queries[0][0], first=2 + k % 3, last=5 + k % 2, k=20 + k), rounds
        ),
        "its agreement, filled in later": timed(lambda k: ask["agreement"](query=queries[0][k]), rounds),
        "a query to compare with": timed(lambda k: ask["compare"](query=queries[0][0], other=queries[1][k]), rounds),
        "an example": timed(
            lambda k: (
                ask["pair"](query=queries[0][0], train=k * 1001 % train),
                ask["reverse"](train=k * 1001 % train),
            ),
            rounds,
        ),
        "all queries": timed(
            lambda k: ask["overall"](weights=("alike", "size")[k % 2], parameters="*" * (k + 1)), rounds
        ),
        "a place in the list": timed(lambda k: ask["queries"](offset=(k * 9973) % len(explorer.query)), rounds),
        "a search in the list": timed(lambda k: ask["queries"](find=f"river {k}"), rounds),
    }


def _text(fields: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in fields.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="training rows (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=20_000, help="(default: %(default)s)")
    parser.add_argument("--columns", type=int, default=1024, help="of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of a query (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--scratch", type=Path, required=True, help="a folder with room for the run")
    add_output(parser, f"explore-{machine_slug()}")
    given = parser.parse_args()
    provenance, run = Provenance(), given.scratch / "explore-run"
    written(run / "train", given.rows, columns=given.columns, steps=0, seed=1)
    written(run / "query", given.queries, columns=given.columns, steps=given.steps, seed=2)
    began = time.perf_counter()
    explorer = Explorer.open(run)
    opened = time.perf_counter() - began
    print(f"{given.rows:,} rows of {given.columns} columns in int8, {given.queries:,} queries of {given.steps} steps")
    print(f"    opened in {opened:.2f} s")
    found = clicks(explorer, given.rounds)
    for name, seconds in found.items():
        print(f"    {name:<32} {seconds['wall s']:6.3f} s, of the processor {seconds['processor s']:6.3f} s")
    shutil.rmtree(run)
    print(machine_line(provenance.finish()))
    size = {name: getattr(given, name) for name in ("rows", "queries", "columns", "steps", "rounds")}
    write(given.json, provenance, {**size, "open s": opened, "clicks": found})


if __name__ == "__main__":
    main()
