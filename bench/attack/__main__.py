"""Attack what the project promises to hold: kill its commands, damage its files, call it with what it must refuse.

    python -m bench.attack --minutes 10                 # all campaigns, each its share
    python -m bench.attack --minutes 2 --campaign stores kills
    python -m bench.attack --inputs 50                  # so many inputs of each, however long that takes
    python -m bench.attack --replay stores:4711         # one input again

Every input is made from the campaign's name and a seed. Files are damaged within a worker process, which is replaced if
it hangs or dies; commands run in processes forked from one that has everything imported, and are killed there. Writes
counts and bad inputs to ``--out``, or with ``--keep`` beside those of the other campaigns that are kept; exit status 1
if any was bad. Needs Linux and faiss (the extra ``index``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from bench.attack.campaign import Campaign
from bench.attack.processes import preload
from bench.attack.report import Report
from bench.attack.verdicts import BAD
from bench.attack.workers import Workers, replayed
from bench.provenance import Provenance, add_output

NAMES = (
    "kills", "pairs", "together", "changes",
    "stores", "checkpoints", "pickles", "configs", "indexes", "operators", "requests", "faults",
)  # fmt: skip
"""The campaigns, each a module of this package."""


def campaigns(names: list[str]) -> list[Campaign]:
    return [import_module(f"bench.attack.{name}").CAMPAIGN for name in names]


def seeds(first: int, inputs: int | None, seconds: float, bar: tqdm[None]) -> Iterator[int]:
    """From ``first`` on, until enough inputs were made or time is over."""
    began = time.monotonic()
    for seed in itertools.count(first):
        passed = time.monotonic() - began
        if (inputs is not None and seed - first >= inputs) or (inputs is None and passed >= seconds):
            return
        yield seed
        bar.update(time.monotonic() - began - passed)


def attacked(chosen: list[Campaign], *, minutes: float, inputs: int | None, first: int, shown: bool = True) -> Report:
    """Attack with these campaigns; each has its share of the minutes, or so many inputs."""
    report, whole = Report(), sum(campaign.share for campaign in chosen)
    if not all(campaign.mutated for campaign in chosen):
        preload()  # once, for all workers
    form = "{l_bar}{bar}| {elapsed} of " + ("some time" if inputs is not None else f"{minutes:g} min") + "{postfix}"
    with Workers() as workers, tqdm(total=60 * minutes, bar_format=form, disable=not shown) as bar:
        for campaign in chosen:
            count, began = report.of(campaign), time.monotonic()
            bar.set_description(campaign.name)
            for seed, verdict in workers.verdicts(
                campaign, seeds(first, inputs, 60 * minutes * campaign.share / whole, bar)
            ):
                count.add(seed, verdict)
                count.seconds = time.monotonic() - began
                bar.set_postfix_str(f", {count.inputs:,} inputs, {report.bad} bad", refresh=False)
                if verdict.bad and count.bad_count <= 3:
                    tqdm.write(f"{verdict.kind}: {campaign.name}:{seed}: {verdict.detail[:300]}", file=sys.stderr)
    return report


def replay(what: str) -> int:
    """One input again, in this process; says what came of it."""
    name, _, seed = what.partition(":")
    if name not in NAMES or not seed.isdigit():
        raise SystemExit(f"--replay: got {what!r}; give CAMPAIGN:SEED, such as stores:4711")
    found = replayed(campaigns([name])[0], int(seed))
    print(f"{found.kind}{f' ({BAD[found.kind]})' if found.bad else ''}: {found.detail}")
    return int(found.bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for all campaigns together")
    parser.add_argument("--inputs", type=int, help="of each campaign, instead of minutes")
    parser.add_argument(
        "--campaign", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help="some of them"
    )
    parser.add_argument("--seed", type=int, default=0, help="of each campaign's first input")
    parser.add_argument("--replay", metavar="CAMPAIGN:SEED", help="one input again")
    parser.add_argument("--out", type=Path, default=Path("attack.json"))
    add_output(parser, "attack")
    options = parser.parse_args()
    if options.replay is not None:
        return replay(options.replay)
    provenance = Provenance()
    report = attacked(campaigns(options.campaign), minutes=options.minutes, inputs=options.inputs, first=options.seed)
    path = options.json or options.out
    earlier = json.loads(path.read_text(encoding="utf-8"))["campaigns"] if options.json and path.is_file() else {}
    facts = {"first seed": options.seed, "provenance": provenance.finish()}
    content = {"provenance": facts["provenance"], **report.as_json(facts, earlier)}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print("\n".join(report.lines()))
    return int(bool(report.bad))


if __name__ == "__main__":
    sys.exit(main())
