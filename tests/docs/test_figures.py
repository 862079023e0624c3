"""What README and docs state as measured is what a kept result says, and every kept result says where it comes from."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reproduce import SCALES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
FACTS = {
    "command", "commit", "dirty", "date", "seconds", "machine", "torch_cpu_capability", "cpu_flags", "environment",
    "versions", "load_before", "load_after",
}  # fmt: skip
PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return importlib.import_module("figures")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_are_those_of_the_kept_results(figures: ModuleType, page: Path) -> None:
    written = page.read_text(encoding="utf-8")
    made = sys.modules["kept"].rewritten(written, figures.PARTS)
    assert made == written, "run: python docs/_site/figures.py"


def test_a_changed_figure_is_noticed(figures: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = [part for _, _, part, _ in sys.modules["kept"].MARK.findall(text) if re.search(r"\d", part)]
    assert len(parts) >= 3
    for part in parts:
        changed = re.sub(r"\d", lambda d: str((int(d[0]) + 1) % 10), part, count=1)
        assert sys.modules["kept"].rewritten(text.replace(part, changed), figures.PARTS) == text


def test_every_part_stands_somewhere(figures: ModuleType) -> None:
    found = {name for page in PAGES for _, name, _, _ in sys.modules["kept"].MARK.findall(page.read_text("utf-8"))}
    assert found == set(figures.PARTS)


def test_marks_are_in_pairs() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        marks = len(re.findall(r"<!-- figures:", text)), len(re.findall(r"<!-- /figures -->", text))
        assert marks[0] == marks[1] == len(sys.modules["kept"].MARK.findall(text)), page


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_kept_result_says_where_it_comes_from(path: Path) -> None:
    provenance: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("provenance", {})
    assert provenance.keys() >= FACTS
    assert re.fullmatch(r"[0-9a-f]{40}", provenance["commit"])
    assert not re.search(r"(^|[\s=])/", provenance["command"]), "no path of one machine"
    assert {"CPU", "cores", "torch threads"} <= provenance["machine"].keys()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_kept_result_is_used(path: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    kind = path.stem.partition("-")[0]
    assert path.name in pages or re.search(rf"bench/results/{kind}[-*{{]", pages)


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"bench/results/([\w.-]+\.json)", page.read_text(encoding="utf-8")):
            assert (ROOT / "bench" / "results" / name).is_file(), f"{page.name}: {name}"


def test_reports_say_what_the_scale_is() -> None:
    for path in (ROOT / "docs" / "results").glob("*/results.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        assert (
            ("-" not in path.parent.name)
            if results["scale"] == "cpu"
            else path.parent.name.endswith(f"-{results['scale']}")
        )
        report = path.with_name("report.md").read_text(encoding="utf-8")
        assert f"Scale `{results['scale']}`: {SCALES[results['scale']]}." in report, path
        minutes = sum(t["cpu_seconds"] for t in results["timings"].values()) / 60
        said = re.search(r"up to (\d+) minutes", SCALES[results["scale"]])
        assert said is not None
        assert minutes <= int(said[1]), path
