"""What it saves and costs that uses of a linear layer wait to be sketched in one call, by loop steps.

    python -m bench.workspace
    python -m bench.workspace --keep    # kept: docs/capture.md states its figures

The Sudoku-like model of bench.capture at a batch of 8, features by step. For each number of loop steps: calls of linear
layers' operators a batch, featurize time over a plain step (processor time, medians of alternating rounds)
and what a call adds to the resident set of a fresh process at its peak, without and with activation checkpointing of
every step (features summed over steps, whose buffer is small).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import stepinfluence
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import malloc
from bench.capture import CASES, SKETCH_SIZE, Case, Looped, growth_mib, loss_fn, mib
from bench.provenance import Provenance, add_output, machine_line, write

STEPS, WORKSPACES, BATCH = (8, 32), (0, 8 << 20, 32 << 20), 8


class Calls(TorchDispatchMode):
    """Counts calls of linear layers' operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("sdi_kernels::linear_sketch_", "sdi_kernels::linear_steps_sketch_")
        return func(*args, **(kwargs or {}))


def case_of(steps: int) -> Case:
    return replace(CASES["sudoku"], steps=steps, batch=BATCH)


def made(steps: int, workspace: int, *, checkpointing: bool = False) -> tuple[Looped, torch.Tensor, Any]:
    torch.manual_seed(0)
    case = case_of(steps)
    model = Looped(case, checkpointing=checkpointing).eval()
    batch = torch.randint(0, case.vocabulary, (case.batch, case.tokens))
    capture = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE, workspace=workspace, verify=False)
    return model, batch, capture


def times(steps: int, rounds: int) -> list[dict[str, Any]]:
    """Calls and time of each workspace."""
    work = {workspace: made(steps, workspace) for workspace in WORKSPACES}
    calls: dict[int, int] = {}
    seconds: dict[int, list[float]] = {workspace: [] for workspace in WORKSPACES}
    plain: list[float] = []
    for workspace, (_, batch, capture) in work.items():
        with Calls() as counted:
            capture.featurize([batch], loss_fn, progress=False)
        calls[workspace] = counted.count
    model, batch, _ = work[0]
    loss_fn(model, batch).sum().backward()
    for number in range(rounds):
        model.zero_grad()
        start = time.process_time()
        loss_fn(model, batch).sum().backward()
        plain.append(time.process_time() - start)
        for workspace in WORKSPACES if number % 2 else WORKSPACES[::-1]:
            _, batch, capture = work[workspace]
            start = time.process_time()
            capture.featurize([batch], loss_fn, progress=False)
            seconds[workspace].append(time.process_time() - start)
    return [
        {
            "steps": steps,
            "workspace": workspace,
            "calls": calls[workspace],
            "seconds": statistics.median(seconds[workspace]),
            "ratio": statistics.median(s / p for s, p in zip(seconds[workspace], plain, strict=True)),
        }
        for workspace in WORKSPACES
    ]


def memory(steps: int, workspace: int, checkpointing: bool) -> float | None:
    """MiB that a call adds to the resident set of this (fresh) process."""
    _, batch, capture = made(steps, workspace, checkpointing=checkpointing)
    capture.featurize([batch[:1]], loss_fn, per_step=False, progress=False)  # one-time allocations of the libraries
    return growth_mib(lambda: capture.featurize([batch], loss_fn, per_step=False, progress=False))


def child(steps: int, workspace: int, checkpointing: bool) -> float | None:
    command = [
        sys.executable,
        "-m",
        "bench.workspace",
        "--memory-of",
        *map(str, (steps, workspace, int(checkpointing))),
    ]
    printed = malloc.printed_by(command)
    return None if printed == "None" else float(printed)


HEAD = ("loop steps", "workspace", "calls", "cost", "peak MiB", "peak MiB, checkpointed")


def cells(row: dict[str, Any]) -> list[str]:
    waits = f"{row['workspace'] >> 20} MiB" if row["workspace"] else "none"
    peaks = [mib(row["peak_mib"]), mib(row["checkpointed_mib"])]
    return [str(row["steps"]), waits, str(row["calls"]), f"{row['ratio']:.2f}", *peaks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    add_output(parser, "workspace")
    parser.add_argument("--memory-of", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        steps, workspace, checkpointing = args.memory_of
        print(memory(steps, workspace, bool(checkpointing)))
        return
    provenance = Provenance()
    rows = []
    print("  ".join(f"{name:>{len(name)}}" for name in HEAD))
    for steps in STEPS:
        for row in times(steps, args.rounds):
            for name, on in (("peak_mib", False), ("checkpointed_mib", True)):
                row[name] = child(steps, row["workspace"], on)
            rows.append(row)
            print("  ".join(f"{cell:>{len(name)}}" for cell, name in zip(cells(row), HEAD, strict=True)), flush=True)
    print(f"\n{machine_line(provenance.finish())}")
    write(args.json, provenance, {"batch": BATCH, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
