"""What it costs to featurize every batch within its training step: ``capture.inline`` against a plain step.

    python -m bench.inline
    python -m bench.inline --keep    # kept: docs/capture.md states its figures

The models of bench.capture, at their batch. Contestants take turns: a plain forward and backward pass; the same with
inline features, summed over steps; the same and a featurize call on the batch after it, which is what one would do
otherwise. Before anything is timed, inline features are held against those of a featurize call. Processor seconds of
one thread, medians of the rounds' ratios to the plain step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import stepinfluence
import torch
from torch import Tensor

from bench.capture import CASES, SKETCH_SIZE, Case, loss_fn, make
from bench.provenance import Provenance, add_output, machine_line, machine_slug, write

PLAIN, INLINE, BESIDE = "plain step", "step with inline features", "step, then a featurize call"


def contestants(case: Case) -> dict[str, Callable[[], Tensor | None]]:
    """Name -> one training step's forward and backward pass, and the features if it gives some."""
    model, batch = make(case)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE)

    def plain() -> None:
        model.zero_grad()
        loss_fn(model, batch).mean().backward()

    def inline() -> Tensor:
        model.zero_grad()
        with capture.inline(batch) as step:
            step.losses(loss_fn(model, batch)).mean().backward()
        return step.features.values

    def beside() -> Tensor:
        plain()
        return capture.featurize([batch], loss_fn, per_step=False, progress=False).values

    return {PLAIN: plain, INLINE: inline, BESIDE: beside}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Median seconds and ratios to the plain step.

    Raises:
        SystemExit: inline features are not those of a featurize call.
    """
    work = contestants(case)
    work[PLAIN]()
    got, want = work[INLINE](), work[BESIDE]()
    assert got is not None
    assert want is not None
    error = float((got - want).norm() / want.norm())
    if not error < 1e-4:
        raise SystemExit(f"{case.name}: inline features differ by {error:.1e}; a wrong result is not timed")
    took: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds):
        for name in work if number % 2 else list(work)[::-1]:
            start = time.process_time()
            work[name]()
            took[name].append(time.process_time() - start)
    ratios = {n: statistics.median(t / p for t, p in zip(took[n], took[PLAIN], strict=True)) for n in work}
    return {"d_model": case.d_model, "steps": case.steps, "batch": case.batch, "error": error,
            "seconds": {n: statistics.median(t) for n, t in took.items()}, "ratio": ratios}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    add_output(parser, f"inline-{machine_slug()}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    provenance, found = Provenance(), {}
    for key in options.models:
        found[key] = measure(CASES[key], options.rounds)
        ratio = found[key]["ratio"]
        print(f"{key}: {', '.join(f'{name} {r:.2f}' for name, r in ratio.items())}", flush=True)
        write(options.json, provenance, {"rounds": options.rounds, "cases": found})
    print(machine_line(provenance.finish()))


if __name__ == "__main__":
    main()
