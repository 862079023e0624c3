"""Random looped models, featurized batch by batch, against batches of one by autograd.

    python -m bench.fuzz --minutes 10                     # models of seeds 0, 1, 2, ...
    python -m bench.fuzz --minutes 10 --seed 100000       # others
    python -m bench.fuzz --models 10000 --minutes 600 --resume   # goes on where it was stopped
    python -m bench.fuzz --without recurrent "hook clamp" # leave operations out
    python -m bench.fuzz --replay 4711                    # the model of a seed again
    python -m bench.fuzz --replay '{"seed":1,"d":2,...}'  # the model of a spec again (or a file that holds one)

Every model is right, refused, or wrong: wrong is a feature that differs from the sketch (or the entry) of the oracle's
gradient by more than 1e-9 of the largest gradient of its batch, and a model that mixes examples and is not refused.
Writes the counts, reasons of refusals and wrong models (shrunk) to ``--out``, once a minute and at the end; exit status
1 if any model was wrong. With ``--resume`` it goes on from what ``--out`` holds; a run of several parts says the commit
and the machine of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from stepinfluence.files import write_atomically
from tqdm import tqdm

from bench.fuzz.check import judge
from bench.fuzz.generate import draw
from bench.fuzz.shrink import shrink
from bench.fuzz.spec import Spec, load
from bench.fuzz.tally import Tally, Wrong, from_json
from bench.provenance import Provenance

EVERY = 60
"""Seconds between two writings of the report."""


def seeds(first: int, models: int | None, seconds: float) -> Iterator[int]:
    """From ``first`` on, until enough models were made or time is over."""
    began = time.monotonic()
    total = 1 + int(seconds)
    with tqdm(total=total, unit="s", bar_format="{l_bar}{bar}| {elapsed} of {total:.0f} s{postfix}") as bar:
        for seed in itertools.count(first):
            passed = time.monotonic() - began
            bar.update(min(total, int(passed)) - bar.n)
            if passed >= seconds or (models is not None and seed - first >= models):
                return
            yield seed


class Report:
    """The file of a run: what it has found so far, and where every part of it was made."""

    def __init__(self, path: Path, first: int, *, resume: bool) -> None:
        self.path, self.first, self.tally = path, first, Tally()
        self.parts: list[dict[str, Any]] = []
        self.provenance = Provenance()
        if resume and path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["first seed"] != first:
                raise SystemExit(f"--seed: got {first}; {path} holds a run from seed {kept['first seed']}; give that")
            self.tally, self.parts = Tally.of_json(kept), kept["parts"]
        self.before = self.tally.models

    def write(self) -> None:
        here = {"models": self.tally.models - self.before, "provenance": self.provenance.finish()}
        parts = [*self.parts, here] if here["models"] or not self.parts else self.parts
        report = {"first seed": self.first, **self.tally.as_json(), "parts": parts, "provenance": here["provenance"]}
        write_atomically(self.path, lambda aside: aside.write_text(json.dumps(report, indent=1) + "\n", "utf-8"))


def run(report: Report, models: int | None, seconds: float, *, without: list[str], exact: bool) -> None:
    tally, written = report.tally, time.monotonic()
    left = None if models is None else models - tally.models
    for seed in seeds(report.first + tally.models, left, seconds):
        spec = draw(Random(seed), without=without)
        try:
            found = judge(spec, exact=exact)
        except BaseException:
            print(f"seed {seed}: {spec.dump()}", file=sys.stderr)
            raise
        tally.add(seed, spec, found)
        if any(outcome.bad for outcome in found.values()):
            tqdm.write(f"wrong: seed {seed}, {', '.join(spec.kinds()) or 'no known kind'}")
        if time.monotonic() - written > EVERY:
            report.write()
            written = time.monotonic()


def shrink_some(found: list[Wrong], per_kind: int, seconds: float) -> None:
    """Shrink until each capture has ``per_kind`` minimal specs of every kind that nothing but this kind can explain.

    Of a combination of kinds no more than ``per_kind`` are tried: most shrink to the same one of them.
    """
    explained = Counter((w.capture, *w.kinds) for w in found if w.minimal is not None)
    tried: Counter[tuple[str, ...]] = Counter()
    for wrong in tqdm(sorted(found, key=lambda w: len(w.kinds)), desc="shrinking", disable=not found):
        wanted = [kind for kind in wrong.kinds if explained[wrong.capture, kind] < per_kind]
        group = (wrong.capture, *wrong.kinds)
        if wrong.minimal is None and wanted and tried[group] < per_kind:
            tried[group] += 1
            shrink_one(wrong, seconds)
            explained[(wrong.capture, *wrong.kinds)] += 1


def shrink_again(path: Path, per_kind: int, seconds: float) -> None:
    """Shrink more of what a report holds."""
    report = json.loads(path.read_text(encoding="utf-8"))
    provenance = Provenance()
    tally = Tally(wrong=[from_json(data) for data in report["wrong"]])
    shrink_some(tally.wrong, per_kind, seconds)
    report |= {"minimal": tally.minimal(), "wrong": [wrong.as_json() for wrong in tally.wrong]}
    report["provenance of shrinking"] = provenance.finish()
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def shrink_one(wrong: Wrong, seconds: float) -> None:
    exact = wrong.capture == "exact"

    def still(spec: Spec) -> bool:
        outcome = judge(spec, exact=exact).get(wrong.capture)
        return outcome is not None and outcome.verdict == wrong.outcome.verdict

    wrong.minimal = shrink(wrong.spec, still, seconds=seconds)
    wrong.minimal_outcome = judge(wrong.minimal, exact=exact)[wrong.capture]


def replay(what: str) -> int:
    """Judge one model again, and say all there is to say."""
    if what.isdigit():
        spec = draw(Random(int(what)))
    else:
        spec = load(what if what.lstrip().startswith("{") else Path(what).read_text(encoding="utf-8"))
    print(spec.dump())
    print("made of:", ", ".join(sorted(spec.features())))
    found = judge(spec)
    for capture, outcome in found.items():
        print(f"{capture}: {outcome.verdict}, error {outcome.error:.1e} {outcome.reason}")
    return int(any(outcome.bad for outcome in found.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--models", type=int, help="stop after so many, those of earlier parts among them")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    parser.add_argument("--seed", type=int, default=0, help="of the first model")
    parser.add_argument("--without", nargs="*", default=[], help="operations or kinds that are not to be drawn")
    parser.add_argument("--sketches-only", action="store_true", help="leave ExactCapture out")
    parser.add_argument("--shrink", type=float, default=30, help="seconds for the shrinking of one wrong model")
    parser.add_argument("--shrink-per-kind", type=int, default=2, help="wrong models shrunk of each kind")
    parser.add_argument("--shrink-again", type=Path, help="a report: shrink more of its wrong models")
    parser.add_argument("--out", type=Path, default=Path("fuzz.json"))
    parser.add_argument("--replay", help="a seed, a spec, or a file with one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.replay is not None:
        return replay(options.replay)
    if options.shrink_again is not None:
        shrink_again(options.shrink_again, options.shrink_per_kind, options.shrink)
        return 0
    report = Report(options.out, options.seed, resume=options.resume)
    exact = not options.sketches_only
    run(report, options.models, 60 * options.minutes, without=options.without, exact=exact)
    tally = report.tally
    shrink_some(tally.wrong, options.shrink_per_kind, options.shrink)
    report.write()
    print("\n".join(tally.lines()))
    return int(bool(tally.wrong))


if __name__ == "__main__":
    sys.exit(main())
