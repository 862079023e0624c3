"""What the benchmarks' results rest on: provenance, and measurements that cannot be taken."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kept
import pytest
import torch
from stepinfluence import provenance as facts
from stepinfluence.capture.verification import Verification

from bench import capture, keep, provenance, soak

ROOT = Path(__file__).resolve().parents[2]


def test_memory_that_cannot_be_measured_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(self: Any) -> None:
        return None

    monkeypatch.setattr("stepinfluence.machine.PeakMemory.peak_bytes", blind)
    assert capture.growth_mib(lambda: None) is None
    assert capture.mib(None) == "n/a"
    monkeypatch.setattr(soak, "resident", lambda: None)
    measured, before, after = soak.soak(0)
    assert [v for _, v in measured] == [None]
    assert soak.growth(measured) is None
    assert before == after


def test_memory_that_does_not_move_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepinfluence.machine.PeakMemory.peak_bytes", lambda self: 5 * 2**20)
    assert capture.growth_mib(lambda: None) is None


def test_memory_is_measured_where_it_can_be() -> None:
    if (found := capture.growth_mib(lambda: torch.ones(16 << 20))) is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 60 < found < 90  # 64 MiB of floats, and a little


def test_first_and_later_calls_are_both_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of first calls verifies in each of them, the row of later calls in none."""
    case = capture.Case("check", 16, 2, 1, 3, 5, 4, 7, True, 1.0)
    runs = []
    check = Verification.check

    def counted(self: Verification, *args: Any) -> None:
        runs.append(1)
        check(self, *args)

    monkeypatch.setattr(Verification, "check", counted)
    work = capture.contestants(case)
    for name, count in ((capture.FIRST, 1), (capture.FIRST, 2), (capture.LATER, 2), (capture.SUMMED, 2)):
        work[name]()
        assert len(runs) == count, name


def test_a_result_is_written_with_where_it_comes_from(tmp_path: Path) -> None:
    before = provenance.Provenance()
    provenance.write(tmp_path / "x.json", before, {"seconds": None})
    kept = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert kept["seconds"] is None
    assert kept["provenance"]["machine"]["torch threads"] == str(torch.get_num_threads())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
    assert kept["provenance"]["commit"] == (head.stdout.strip() or "n/a")
    assert provenance.machine_line(kept["provenance"])
    with pytest.raises(ValueError, match="JSON"):
        provenance.write(tmp_path / "y.json", before, {"seconds": float("nan")})


def test_sources_outside_of_a_checkout_have_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)  # noqa: S607
    monkeypatch.setattr(facts, "SOURCES", tmp_path)  # installed into somebody's repository
    assert facts.checkout() == {"commit": "n/a", "dirty": "n/a"}


def test_where_a_command_writes_is_not_kept() -> None:
    given = ["--rounds", "3", "--json", "/home/me/x.json", "--keep", "--scratch", "/somewhere/s", "--cpu-seconds"]
    assert provenance.asked(given) == "--rounds 3 --cpu-seconds"


def test_the_name_of_a_machine_is_a_file_name() -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", provenance.machine_slug())


def test_one_helper_says_what_the_machine_is() -> None:
    """Of each kind one: no benchmark looks the CPU up by itself."""
    for path in (ROOT / "bench").rglob("*.py"):
        assert "/proc/cpuinfo" not in path.read_text(encoding="utf-8"), path


def test_one_command_makes_every_kind_of_result() -> None:
    assert set(keep.COMMANDS) == set(kept.KINDS)
