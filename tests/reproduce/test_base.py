"""The run folder: stages survive, settings are checked, reports hold what was found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from reproduce import EXPERIMENTS, SCALES
from reproduce.base import Comparison, Outcome, Run
from reproduce.report import write_report
from reproduce.style import figure, styled


@dataclass(frozen=True)
class Config:
    seed: int = 0
    sizes: tuple[int, ...] = (1, 2)


def open_run(folder: Path, config: Config | None = None) -> Run[Config]:
    return Run(folder, "parity", "minute", config or Config())


def test_a_stage_is_computed_once_and_comes_back_the_same(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, object]:
        calls.append(1)
        return {
            "array": np.arange(6, dtype=np.float32).reshape(2, 3),
            "pair": (1, 2),
            "value": np.float64(0.5),
            "text": "x",
        }

    first = open_run(tmp_path / "run").stage("s", compute)
    second = open_run(tmp_path / "run").stage("s", compute)
    assert calls == [1]
    assert first["pair"] == second["pair"] == [1, 2]
    assert first["value"] == second["value"] == 0.5
    np.testing.assert_array_equal(first["array"], second["array"])
    assert second["array"].dtype == np.float32


def test_a_stage_that_failed_is_computed_again(tmp_path: Path) -> None:
    def fails() -> dict[str, object]:
        raise RuntimeError("stop")

    run = open_run(tmp_path / "run")
    with pytest.raises(RuntimeError, match="stop"):
        run.stage("s", fails)
    assert open_run(tmp_path / "run").stage("s", lambda: {"value": 3})["value"] == 3


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    open_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"seed: 0, now 1"):
        open_run(tmp_path / "run", Config(seed=1))


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds no earlier run"):
        open_run(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_stages_refuse_what_cannot_come_back(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="neither an array nor a plain value"):
        open_run(tmp_path / "run").stage("s", lambda: {"value": object()})


def test_report_shows_our_number_beside_the_papers(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.stage("s", lambda: {"value": 1})
    with styled():
        drawn, axes = figure()
        axes.plot([1, 2], [3, 4])
        name = run.figure("line", drawn)
    outcome = Outcome(
        title="A <title>",
        summary="What <script>came</script> out.",
        comparisons=(Comparison("error", 0.04321, 0.0388, "Fig. 4"), Comparison("period", "4 | 4", None)),
        body=f"## Part\n\nText.\n\n![{name}](figures/{name}.png)",
        numbers={"x": 1},
    )
    page = write_report(run, outcome, "python -m reproduce parity").read_text()
    text = (run.folder / "report.md").read_text()
    assert "| error | 0.0432 | 0.0388 | Fig. 4 |" in text
    assert "| period | 4 \\| 4 | – |" in text
    assert "<script>" not in page
    assert "A &lt;title&gt;" in page
    assert 'src="data:image/png;base64,' in page
    assert (run.folder / "figures" / "line.png").exists()
    results = json.loads((run.folder / "results.json").read_text())
    assert results["comparisons"][0]["paper"] == 0.0388
    assert results["timings"].keys() == {"s"}


def test_figures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    files = []
    for folder in ("a", "b"):
        run = open_run(tmp_path / folder)
        with styled():
            drawn, axes = figure()
            axes.plot([1, 2], [3, 4])
            run.figure("line", drawn)
        files.append((run.folder / "figures" / "line.png").read_bytes())
    assert files[0] == files[1]


def test_every_experiment_has_every_scale() -> None:
    from importlib import import_module

    for name, entry in EXPERIMENTS.items():
        scales = set(import_module(f"{entry.package}.config").CONFIGS)
        assert {"minute", "cpu", "paper"} <= scales <= set(SCALES), name
        assert callable(import_module(f"{entry.package}.run").run)
