"""Every campaign of ``make attack`` with a few seeds, and that it finds faults which were planted."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from stepinfluence import store
from stepinfluence.errors import StoreError

from bench.attack import stores
from bench.attack.__main__ import NAMES, attacked, campaigns
from bench.attack.campaign import Campaign
from bench.attack.mutate import damaged, odd_json
from bench.attack.processes import Ended, must_work, of_command
from bench.attack.verdicts import BAD, CRASHED, HANG, REFUSED, SAME, SILENT, UNCAUGHT, UNJUST, Verdict, judged
from bench.attack.workers import Workers, random_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the campaigns fork, and read /proc")


def test_every_campaign_with_a_few_seeds(tmp_path: Path) -> None:
    """In a process that has not computed a gradient yet: threads of autograd would not survive the forks."""
    out = tmp_path / "attack.json"
    command = [sys.executable, "-m", "bench.attack", "--inputs", "2", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert list(report["campaigns"]) == list(NAMES)
    assert all(sum(c["verdicts"].values()) == c["inputs"] == 2 for c in report["campaigns"].values())
    assert report["mutated inputs"] == 16
    assert report["kills"] >= 1
    assert report["bad"] == dict.fromkeys(BAD, 0)
    assert report["provenance"]["command"] == "python -m bench.attack --inputs 2"


def spins(_: Random) -> Verdict:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        pass
    return Verdict(SAME)


def falls_over(_: Random) -> Verdict:
    ctypes.string_at(0)
    return Verdict(SAME)


def leaves(_: Random) -> Verdict:
    os._exit(3)


def raises(_: Random) -> Verdict:
    _, verdict = judged(lambda: [][0], (StoreError,), "an empty list")
    return verdict or Verdict(SAME)


def many_lines(_: Random) -> Verdict:
    def use() -> None:
        raise ValueError("one\ntwo")

    _, verdict = judged(use, (ValueError,), "two lines")
    return verdict or Verdict(SAME)


FAULTS: dict[str, tuple[Callable[[Random], Verdict], str]] = {
    "hangs": (spins, HANG),
    "a segmentation fault": (falls_over, CRASHED),
    "an exit": (leaves, CRASHED),
    "another exception": (raises, UNCAUGHT),
    "an error of several lines": (many_lines, UNCAUGHT),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_must_not_happen_is_a_verdict_and_not_the_end(name: str) -> None:
    attack, wanted = FAULTS[name]

    def every_second(rng: Random) -> Verdict:
        return attack(rng) if rng.random() < 0.5 else Verdict(SAME)

    campaign = Campaign("planted", "a planted fault", 1.0, lambda _: every_second)
    found = {}
    with Workers(limit=0.5) as workers:
        for seed, verdict in workers.verdicts(campaign, range(4)):
            found[seed] = verdict.kind
    assert found == {s: wanted if random_of("planted", s).random() < 0.5 else SAME for s in range(4)}
    assert wanted in found.values()


def test_a_check_that_finds_nothing_is_a_silent_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage to values is found by ``verify`` alone: without it, nothing tells."""
    whole = attacked([stores.CAMPAIGN], minutes=0, inputs=60, first=0, shown=False)
    assert whole.bad == 0
    monkeypatch.setattr(store, "verify", lambda path: [])
    report = attacked([stores.CAMPAIGN], minutes=0, inputs=60, first=0, shown=False)
    assert report.of(stores.CAMPAIGN).verdicts[SILENT] == whole.of(stores.CAMPAIGN).verdicts["found"] > 0
    [shown] = [line for line in report.lines() if line.startswith("BAD")]
    assert "silent" in shown
    seed = report.of(stores.CAMPAIGN).bad[SILENT][0][0]
    assert any(f"--replay stores:{seed}" in line for line in report.lines())


def test_how_a_command_ended() -> None:
    def ended(code: int | None, text: str) -> Ended:
        return Ended(code, text, disturbed=False, process=0)

    assert of_command(ended(0, ""), "x").kind == SAME
    assert of_command(ended(2, "sdi: out: missing"), "x").kind == REFUSED
    assert of_command(ended(1, "Traceback (most recent call last):"), "x").kind == UNCAUGHT
    assert of_command(ended(-11, ""), "x").kind == UNCAUGHT
    assert of_command(ended(None, ""), "x").kind == HANG
    refused = must_work(ended(2, "sdi: no"), "x")
    assert refused is not None
    assert refused.kind == UNJUST


def test_a_seed_tells_everything() -> None:
    data = json.dumps({"a": [1, {"b": "text"}], "c": 0.5}).encode() * 3
    assert [damaged(Random(k), data) for k in range(200)] == [damaged(Random(k), data) for k in range(200)]
    made = {odd_json(Random(k), data[: len(data) // 3]) for k in range(200)}
    assert len(made) > 100
    assert [c.name for c in campaigns(list(NAMES))] == list(NAMES)
