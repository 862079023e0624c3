"""What featurizing costs: this project, the published package and a plain training step, side by side.

    python -m bench.capture --keep                   # all of it, kept for this machine: the README's table
    python -m bench.capture [--models sudoku parity gpt512 gpt768] [--rounds 5] [--json FILE]
    python -m bench.capture --parts scaling          # how cost grows with batch, tokens and loop steps
    python -m bench.capture --parts checkpointing    # peak memory against loop steps, with checkpointing and without

One model after the other; within a model the contestants alternate in every round, so that they see the same
machine. Figures are medians of seconds; ratios are medians of the rounds' ratios to the plain step. What is timed is
a call as a user makes it, on one batch: the first call with a loss function and weights verifies that examples are told
apart (one more pass), later ones do not. Before anything is timed, the sketches are checked against exact gradients in
miniature. Peak memory is what the second call of a fresh process adds to its resident set.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import stepinfluence
import torch
from stepinfluence.machine import PeakMemory
from stepinfluence.models.blocks import Block, BlockConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench import malloc
from bench.provenance import Provenance, add_output, machine_line, machine_slug, write

SKETCH_SIZE = 2048
PLAIN, FLOOR = "plain forward+backward", "floor (forward + input gradients)"
FIRST, LATER, SUMMED = "sdi-kernels, first call", "sdi-kernels, later calls", "sdi-kernels, later calls, summed"
PUBLISHED = "published package, per step"
PARTS = ("costs", "scaling", "checkpointing")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """One looped model and batch of docs/design.md's end-to-end table."""

    name: str
    d_model: int
    heads: int
    blocks: int
    steps: int
    tokens: int
    batch: int
    vocabulary: int
    causal: bool
    target: float
    """Featurize time over plain forward+backward that the project aims at."""


CASES = {
    case.name: case
    for case in (
        Case("sudoku", 128, 4, 1, 32, 81, 32, 10, False, 1.0),
        Case("parity", 256, 64, 1, 42, 42, 32, 6, True, 1.0),
        Case("gpt512", 512, 8, 2, 8, 128, 8, 1024, True, 0.8),
        Case("gpt768", 768, 12, 4, 4, 128, 8, 1024, True, 0.7),
    )
}


class Core(nn.Module):
    """The loop body: a stack of pre-norm blocks, entered once per step."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        config = BlockConfig(case.d_model, case.heads, causal=case.causal)
        self.blocks = nn.ModuleList(Block(config) for _ in range(case.blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Looped(nn.Module):
    """Embedding, ``steps`` entries into the core with additive input injection, read-out."""

    def __init__(self, case: Case, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.steps = case.steps
        self.checkpointing = checkpointing
        self.embed = nn.Embedding(case.vocabulary, case.d_model)
        self.core = Core(case)
        self.head = nn.Linear(case.d_model, case.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        injected = self.embed(tokens)
        x = injected
        for _ in range(self.steps):
            if self.checkpointing:
                x = checkpoint(self.core, x + injected, use_reentrant=False)
            else:
                x = self.core(x + injected)
        logits: Tensor = self.head(x)
        return logits


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy per example: ``(B,)``."""
    return F.cross_entropy(model(tokens).transpose(1, 2), tokens, reduction="none").mean(1)


def make(case: Case) -> tuple[Looped, Tensor]:
    torch.manual_seed(0)
    model = Looped(case).eval()
    return model, torch.randint(0, case.vocabulary, (case.batch, case.tokens))


def contestants(case: Case) -> dict[str, Callable[[], object]]:
    """Name -> one unit of work on the same batch."""
    model, batch = make(case)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE)

    def plain() -> None:
        model.zero_grad()
        loss_fn(model, batch).sum().backward()

    def floor() -> None:
        for parameter in model.core.parameters():
            parameter.requires_grad_(False)
        try:
            model.embed.weight.grad = None
            loss_fn(model, batch).sum().backward(inputs=[model.embed.weight])
        finally:
            for parameter in model.core.parameters():
                parameter.requires_grad_(True)

    def first() -> object:
        return capture.featurize([batch], loss_fn, progress=False, verify=True)

    def later() -> object:
        return capture.featurize([batch], loss_fn, progress=False)

    def summed() -> object:
        return capture.featurize([batch], loss_fn, per_step=False, progress=False)

    work: dict[str, Callable[[], object]] = {PLAIN: plain, FLOOR: floor, FIRST: first, LATER: later, SUMMED: summed}
    try:
        from sdi import ProjectedTracInSDI
    except ImportError:
        print("published package not installed (pip install 'sdi-kernels[bench]'): left out", file=sys.stderr)
        return work
    other_model, _ = make(case)
    published = ProjectedTracInSDI(model=other_model, target_modules=other_model.core, projection_size=SKETCH_SIZE)
    work[PUBLISHED] = lambda: published.featurize_loader(loader=[batch], loss_fn=loss_fn)
    return work


def check_correct() -> None:
    """Refuse to time a wrong result: conservation, and agreement with exact gradients, on a small model.

    Raises:
        SystemExit: the sketches are wrong.
    """
    case = Case("check", 16, 2, 1, 3, 5, 4, 7, True, 1.0)
    model, batch = make(case)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=1 << 15)
    features = capture.featurize([batch], loss_fn, progress=False)
    exact = stepinfluence.ExactCapture(model, body=model.core).featurize([batch], loss_fn, progress=False)
    got = stepinfluence.influence(features, features).sdi
    want = stepinfluence.influence(exact, exact).sdi
    error = float((got - want).norm() / want.norm())
    if not error < 0.02:
        raise SystemExit(f"refusing to report: SDI differs from exact gradients by {error:.3g} in relative norm")


def measure(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, Any]]:
    """Seconds per contestant: median, minimum and the median ratio to the plain step."""
    work = contestants(case)
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    plain = seconds[PLAIN]
    return {
        name: {
            "median_s": statistics.median(times),
            "min_s": min(times),
            "ratio": statistics.median(t / p for t, p in zip(times, plain, strict=True)),
        }
        for name, times in seconds.items()
    }


def peak_memory(case: Case, name: str) -> float | None:
    """MiB that a second call adds to the resident set of this (fresh) process; None where the system does not tell."""
    run = contestants(case)[name]
    run()  # one-time allocations of the libraries, and verification
    return growth_mib(run)


def growth_mib(run: Callable[[], object]) -> float | None:
    """MiB by which a call raises the resident set at its peak; None where the system does not tell."""
    meter = PeakMemory()
    before = meter.peak_bytes()
    run()
    after = meter.peak_bytes()
    if before is None or after is None or after <= before:  # a pass needs some: no growth means that none was seen
        return None
    return (after - before) / 2**20


def mib(value: float | None) -> str:
    """For people; what was not measured is not zero."""
    return "n/a" if value is None else f"{value:.0f}"


CHECKPOINTING = Case("checkpointing", 128, 4, 1, 8, 81, 32, 10, False, 1.0)


def checkpointing_memory(steps: int, on: bool) -> float | None:
    """MiB that featurizing adds to the resident set of this (fresh) process; features are summed over steps."""
    case = replace(CHECKPOINTING, steps=steps)
    torch.manual_seed(0)
    model = Looped(case, checkpointing=on).eval()
    batch = torch.randint(0, case.vocabulary, (case.batch, case.tokens))
    capture = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE)
    capture.featurize([batch[:1]], loss_fn, per_step=False, progress=False)  # one-time allocations of the libraries
    return growth_mib(lambda: capture.featurize([batch], loss_fn, per_step=False, progress=False))


def checkpointing() -> list[dict[str, Any]]:
    """Peak memory at three loop counts: checkpointed, only a state per step stays."""
    rows = []
    print(f"\n{'loop steps':>10}{'plain MiB':>12}{'checkpointed MiB':>18}")
    for steps in (8, 16, 32):
        plain, saved = (_child("--checkpointing-of", str(steps), str(int(on))) for on in (False, True))
        rows.append({"steps": steps, "plain_mib": plain, "checkpointed_mib": saved})
        print(f"{steps:>10}{mib(plain):>12}{mib(saved):>18}", flush=True)
    return rows


def _child(*arguments: str) -> float | None:
    command = [sys.executable, "-m", "bench.capture", *arguments, "--threads", str(torch.get_num_threads())]
    printed = malloc.printed_by(command)
    return None if printed == "None" else float(printed)


def scaling(rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Featurize seconds at three sizes of batch, tokens and loop steps; linear growth is a straight column."""
    base = Case("scaling", 128, 4, 1, 8, 64, 16, 10, False, 1.0)
    rows = []
    print(f"\n{'':<16}{'seconds':>10}{'per unit of the smallest':>28}")
    for field in ("batch", "tokens", "steps"):
        calls = {factor: _featurizer(replace(base, **{field: factor * getattr(base, field)})) for factor in (1, 2, 4)}
        times: dict[int, list[float]] = {factor: [] for factor in calls}
        for call in calls.values():
            call()
        for _ in range(rounds):
            for factor, call in calls.items():
                start = clock()
                call()
                times[factor].append(clock() - start)
        for factor, taken in times.items():
            ratio = statistics.median(t / one for t, one in zip(taken, times[1], strict=True))
            size = factor * getattr(base, field)
            row = {"field": field, "size": size, "seconds": statistics.median(taken), "ratio": ratio, "factor": factor}
            rows.append(row)
            print(f"{field:>8} = {size:<5}{row['seconds']:>10.4f}{ratio / factor:>28.2f}", flush=True)
    return rows


def _featurizer(case: Case) -> Callable[[], object]:
    model, batch = make(case)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE)
    return lambda: capture.featurize([batch], loss_fn, progress=False)


def costs(key: str, rounds: int, clock: Callable[[], float], *, memory: bool) -> dict[str, Any]:
    """Every contestant on one model."""
    case = CASES[key]
    figures = measure(case, rounds, clock)
    shape = f"d={case.d_model}, {case.blocks} block(s), tau={case.steps}, {case.tokens} tokens, batch {case.batch}"
    print(f"\n{key}: {shape}")
    print(f"  {'':<36}{'median s':>10}{'min s':>10}{'ratio':>8}{'peak MiB':>10}")
    for name, row in figures.items():
        row["peak_mib"] = _child("--memory-of", case.name, name) if memory else None
        peak = f"{mib(row['peak_mib']):>10}"
        print(f"  {name:<36}{row['median_s']:>10.3f}{row['min_s']:>10.3f}{row['ratio']:>8.2f}{peak}", flush=True)
    print(f"  target for sdi-kernels, later calls: ratio <= {case.target}")
    return {"case": asdict(case), "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: CPU seconds, for a machine that others use, too"
    )
    parser.add_argument("--memory", nargs="*", default=["sudoku"], help="models whose peak memory is measured, too")
    add_output(parser, f"capture-{machine_slug()}")
    parser.add_argument("--checkpointing-of", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_memory(CASES[args.memory_of[0]], args.memory_of[1]))
        return
    if args.checkpointing_of:
        print(checkpointing_memory(args.checkpointing_of[0], bool(args.checkpointing_of[1])))
        return
    provenance = Provenance()
    check_correct()
    report: dict[str, Any] = {"sketch_size": SKETCH_SIZE, "rounds": args.rounds, "clock": args.clock}
    print(f"m = {SKETCH_SIZE}; medians of {args.rounds} alternating rounds, {args.clock} seconds")
    clock = CLOCKS[args.clock]
    if "costs" in args.parts:
        report["cases"] = {}
        for key in args.models:
            report["cases"][key] = costs(key, args.rounds, clock, memory=key in args.memory)
            write(args.json, provenance, report)  # what there is, should the rest be interrupted
    if "scaling" in args.parts:
        report["scaling"] = scaling(args.rounds, clock)
    if "checkpointing" in args.parts:
        report["checkpointing"] = checkpointing()
    print(f"\n{machine_line(provenance.finish())}")
    write(args.json, provenance, report)


if __name__ == "__main__":
    main()
