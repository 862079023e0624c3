"""This project against full per-example gradients: time and peak memory, for a linear layer and for looped models.

    python -m bench.per_example                     # everything; a quarter of an hour of one core
    python -m bench.per_example --keep              # kept for this machine: docs/cpu.md is made from it
    python -m bench.per_example --parts layers      # one linear layer; "batch" and "steps": a looped model's sizes

Contestants: this project, the published package, gradients by einsum, ``torch.func`` (vmap of grad), Opacus' grad
samples, one example at a time, and full gradients that are sketched once they are there. All get the same inputs, and
are checked against plain autograd first. Peak memory is what the second call of a fresh process adds to its resident
set; it gets ``--limit-gib`` and no more, and one that needs more is "out of memory". What fits is timed in turns in
one process: medians of processor seconds, and of the rounds' ratios to this project.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from bench.capture import mib
from bench.per_example import layers, models
from bench.per_example.memory import OUT_OF_MEMORY, peak, print_peak
from bench.per_example.picture import draw
from bench.provenance import RESULTS, ROOT, Provenance, add_output, machine_line, machine_slug, write

PARTS = ("layers", *models.SIZES)
PATIENCE = 30.0
"""Seconds; who takes longer is called once, and not asked about larger sizes."""


def work_of(part: str, index: int) -> dict[str, Callable[[], Any]]:
    """The contestants of one size."""
    if part == "layers":
        return {name: c.call for name, c in layers.contestants(layers.LAYERS[index]).items()}
    return models.contestants(models.SIZES[part][index])


def in_turns(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every round; short calls are repeated until a round takes about 5 ms."""
    repeats, took = {}, {}
    for name, call in work.items():
        call()
        start = time.process_time()
        call()
        once = time.process_time() - start
        repeats[name] = max(1, min(20, round(5e-3 / max(once, 1e-6)))) if once < PATIENCE else 0
        took[name] = [] if repeats[name] else [once] * rounds
    for number in range(rounds):
        for name in list(work) if number % 2 else list(work)[::-1]:
            if not repeats[name]:
                continue
            start = time.process_time()
            for _ in range(repeats[name]):
                work[name]()
            took[name].append((time.process_time() - start) / repeats[name])
    return took


def measure(part: str, index: int, skip: set[str], rounds: int, limit: float) -> list[dict[str, Any]]:
    """A row for each contestant of one size that is not in ``skip``."""
    work = {name: call for name, call in work_of(part, index).items() if name not in skip}
    memory = {name: peak(part, index, name, limit) for name in work}
    took = in_turns({name: call for name, call in work.items() if memory[name] != OUT_OF_MEMORY}, rounds)
    ours = took[layers.OURS if part == "layers" else models.OURS]
    return [
        {
            "name": name,
            "peak_mib": None if memory[name] == OUT_OF_MEMORY else memory[name],
            "out_of_memory": memory[name] == OUT_OF_MEMORY,
            "seconds": statistics.median(took[name]) if name in took else None,
            "over_ours": _ratio(took[name], ours) if name in took else None,
        }
        for name in work
    ]


def _ratio(took: list[float], other: list[float]) -> float:
    return statistics.median(t / o for t, o in zip(took, other, strict=True))


def size_of(part: str, index: int) -> dict[str, Any]:
    if part == "layers":
        return dict(zip(("d_out", "d_in", "rows", "tokens"), layers.LAYERS[index], strict=True))
    case = models.SIZES[part][index]
    return {"batch": case.batch, "steps": case.steps, "tokens": case.tokens, "d_model": case.d_model}


def show(size: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    print("\n" + ", ".join(f"{k} {v}" for k, v in size.items()))
    print(f"  {'':<36}{'seconds':>12}{'over ours':>11}{'peak MiB':>10}")
    for row in rows:
        if row["out_of_memory"]:
            print(f"  {row['name']:<36}{'out of memory':>33}", flush=True)
        else:
            line = f"  {row['name']:<36}{row['seconds']:>12.4f}{row['over_ours']:>11.2f}{mib(row['peak_mib']):>10}"
            print(line, flush=True)


def run(parts: list[str], rounds: int, limit: float) -> Iterator[dict[str, Any]]:
    """Part -> its sizes with their rows, after each size."""
    found: dict[str, Any] = {part: [] for part in parts}
    counts = {part: len(layers.LAYERS) if part == "layers" else len(models.SIZES[part]) for part in parts}
    with tqdm(total=sum(counts.values()), unit="size", file=sys.stderr, mininterval=1) as bar:
        for part in parts:
            beyond: set[str] = set()
            for index in range(counts[part]):
                rows = measure(part, index, beyond, rounds, limit)
                found[part].append({"size": size_of(part, index), "rows": rows})
                show(size_of(part, index), rows)
                if part != "layers":  # along an axis: larger is slower and takes more
                    beyond |= {r["name"] for r in rows if r["out_of_memory"] or r["seconds"] > PATIENCE}
                bar.update()
                yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-gib", type=float, default=4.0, help="memory that a call may add")
    parser.add_argument("--threads", type=int, default=1)
    add_output(parser, f"per-example-{machine_slug()}")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus, at the first layer
    if options.peak_of:
        part, index, name = options.peak_of
        print_peak(work_of(part, int(index))[name], options.limit_gib)
        return
    provenance = Provenance()
    for layer in layers.LAYERS:
        layers.check(layer)
    models.check()
    facts = {"sketch_size": layers.SKETCH_SIZE, "rounds": options.rounds, "limit_gib": options.limit_gib}
    found: dict[str, Any] = {}
    for found in run(options.parts, options.rounds, options.limit_gib):
        write(options.json, provenance, {**facts, **found})  # what there is, should the rest be interrupted
    print(f"\n{machine_line(provenance.finish())}")
    if options.json is not None:
        kept = options.json.parent == RESULTS
        draw(found, ROOT / "docs" / "images" / "per-example.png" if kept else options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
