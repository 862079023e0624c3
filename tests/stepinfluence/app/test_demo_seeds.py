"""The table of seeds and instruction sets: kept cells are not run again, and counts count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import demo_seeds


class Runner:
    """Stands in for the demo: every third seed has no period, seed 1 is not solved."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def __call__(self, seed: int, capability: str) -> dict[str, Any]:
        self.asked.append((seed, capability))
        query = {
            "text": "01" * 10 + "=",
            "checkpoint_shares": [0.1, 0.9],
            "dominated_by": "update 2",
            "largest_example": 0.25,
            "periods": {
                "profile": {"lag": 4, "correlation": 0.7, "p_value": 0.2 if seed % 3 == 0 else 0.001},
                "energy": {"lag": 4, "correlation": 0.7, "p_value": 0.02},
                "plain_profile": {"lag": 4, "correlation": 0.7, "p_value": 0.2 if seed == 2 else 0.001},
                "plain_energy": {"lag": 3, "correlation": 0.7, "p_value": 0.001},
                "margin": {"lag": 3, "correlation": 0.7, "p_value": 0.001},
            },
        }
        found = {
            "solved": seed != 1,
            "queries": [query, {**query, "text": "0110="}],
            "accuracy": {"4": 1.0, "5": 0.1, "20": 0.995},
            "accuracy_beyond_training": {"25": 0.2},
            "sdi_error": 0.1,
            "stages": [{"seconds": 1.0, "cpu_seconds": 0.5}],
        }
        settings = demo_seeds.settings(seed)
        return {**demo_seeds.cell_of(found), "seed": seed, "capability": capability, "config": settings}


def test_cells_are_kept_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = Runner()
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert demo_seeds.main(["--seeds", "1-2", "--capabilities", "default", *folders], runner) == 0
    assert runner.asked == [(1, "default"), (2, "default")]
    assert demo_seeds.main(["--seeds", "0-3", "--capabilities", "default", "avx2", *folders], runner) == 0
    assert len(runner.asked) == 8  # six more
    shown = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    energy, margin = ["none", "0.020"], ["3", "0.001"]
    rest = [*energy, "4", "0.001", *margin]
    plain = [*energy, "none", "0.200", *margin]
    assert ["2", "avx2", "20 bits", "99.5 %", "yes", "0.90", "0.25", "4", "0.001", *plain] in lines
    assert ["0", "default", "20 bits", "99.5 %", "yes", "0.90", "0.25", "none", "0.200", *rest] in lines
    assert ["1", "default", "20 bits", "99.5 %", "NO", "0.90", "0.25", "4", "0.001", *rest] in lines
    assert "avx2: 3 of 4 solved, 2 of 4 show period 4 in the default view (regardless of sign 0; " in shown
    assert "without curvature 3 and 0), 1 both" in shown
    (file,) = (tmp_path / "out").iterdir()
    kept = json.loads(file.read_text())
    assert kept["summary"]["default"] == {
        "runs": 4,
        "solved": 3,
        "period_of_4": 2,
        "energy_period_of_4": 0,
        "plain_period_of_4": 3,
        "plain_energy_period_of_4": 0,
        "both": 1,
    }
    assert {"commit", "machine", "versions", "torch_cpu_capability"} <= kept["provenance"].keys()
    assert demo_seeds.main(["--table", str(file)], runner) == 0
    assert shown.splitlines()[-12:-2] == capsys.readouterr().out.splitlines()[2:-1]


def test_a_cell_of_other_settings_is_run_again(tmp_path: Path) -> None:
    runner = Runner()
    demo_seeds.collect([(2, "default")], tmp_path, runner, lambda _: None)
    file = tmp_path / "seed-2-default.json"
    cell = json.loads(file.read_text())
    cell["config"]["training"]["final_steps"] += 1
    file.write_text(json.dumps(cell))
    demo_seeds.collect([(2, "default")], tmp_path, runner, lambda _: None)
    file.write_text("{ half a file")
    demo_seeds.collect([(2, "default")], tmp_path, runner, lambda _: None)
    demo_seeds.collect([(2, "default")], tmp_path, runner, lambda _: None)
    assert len(runner.asked) == 3


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,2"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(SystemExit):
        demo_seeds.main(["--seeds", text])


def test_capabilities_of_this_machine() -> None:
    assert demo_seeds.capabilities()[0] == "default"
    assert demo_seeds.seeds_of("0-2") == [0, 1, 2]
