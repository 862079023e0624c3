"""A report's audit trail: it names its stores, and what does not fit them is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from explored import write_run
from stepinfluence.app.cli import app
from stepinfluence.app.view.explore import Explorer, write_page
from stepinfluence.app.view.explore.audit import problems, read_page, seal, splits
from stepinfluence.app.view.page import embed
from stepinfluence.errors import StoreError
from typer.testing import CliRunner, Result

ROW = 2


@pytest.fixture
def page(explorer: Explorer, tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    write_page(explorer, path, rows=[ROW], progress=False)
    return path


def changed(page: Path, change: Callable[[dict[str, Any]], object], *, resealed: bool = False) -> Path:
    """The page with other data."""
    content = read_page(page)
    before = embed(content)
    change(content)
    if resealed:
        content["overview"]["seal"] = seal(content["overview"], content["answers"])
    text = page.read_text(encoding="utf-8")
    assert text.count(before) == 1
    page.write_text(text.replace(before, embed(content)), encoding="utf-8")
    return page


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == code, done.output
    return done


def test_a_page_of_one_query_fits_its_run(explorer: Explorer, page: Path) -> None:
    content = read_page(page)
    assert list(content["answers"]["byQuery"]) == [str(ROW)]
    assert [q["row"] for q in content["answers"]["queries"]] == [ROW]
    assert splits(page) == ("train", explorer.query.path.name)
    for digest in content["overview"]["digests"].values():
        assert len(digest) == 64
        assert f"<code>{digest}</code>" in page.read_text(encoding="utf-8")
    assert problems(explorer, page) == []


def test_corrected_scores_do_not_hide_sdi(corrected: Explorer, tmp_path: Path) -> None:
    write_page(corrected, tmp_path / "page.html", rows=[0], progress=False)
    assert problems(corrected, tmp_path / "page.html") == []


def test_a_changed_page_is_found(explorer: Explorer, page: Path) -> None:
    def other_id(content: dict[str, Any]) -> None:
        content["answers"]["byQuery"][str(ROW)]["scores"]["sdi"]["examples"][0]["id"] = "someone else"

    [sealed, named] = problems(explorer, changed(page, other_id))
    assert "was changed since it was written" in sealed
    assert "influence of" in named


def test_a_changed_page_that_was_sealed_again_does_not_fit_the_stores(explorer: Explorer, page: Path) -> None:
    def other_score(content: dict[str, Any]) -> None:
        content["answers"]["byQuery"][str(ROW)]["scores"]["sdi"]["examples"][0]["sdi"][1] *= 1.01

    [problem] = problems(explorer, changed(page, other_score, resealed=True))
    assert "is another by the store" in problem


def test_a_changed_text_is_found(explorer: Explorer, page: Path) -> None:
    def other_text(content: dict[str, Any]) -> None:
        content["answers"]["byQuery"][str(ROW)]["example"]["text"] = "what was never asked"

    [problem] = problems(explorer, changed(page, other_text, resealed=True))
    assert "its text, loss or answer is another in the store" in problem


def test_answers_of_another_shape_are_told_and_not_run_into(explorer: Explorer, page: Path) -> None:
    [problem] = problems(explorer, changed(page, lambda c: c["answers"].update(byQuery={"x": 1}), resealed=True))
    assert "its answers are not those that sdi report writes" in problem


def test_another_run_is_told_apart(page: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    train = other / "train" / "manifest.json"
    assert train.is_file()
    shutil.rmtree(other / "train")
    shutil.copytree(other / read_page(page)["overview"]["splits"]["query"], other / "train")
    found = problems(Explorer.open(other), page)
    assert any("was made from another train store" in problem for problem in found)
    assert not any("another query store" in problem for problem in found)


def test_what_is_no_report_is_refused(explorer: Explorer, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(StoreError, match="could not be read"):
        read_page(path)
    for text in ("", "<html></html>", '<script type="application/json" id="data">[1]</script>'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(StoreError, match="holds no answers of a run; give a file that sdi report wrote"):
            read_page(path)
    path.write_text('<script type="application/json" id="data">{"overview":{},"answers":{}}</script>', encoding="utf-8")
    with pytest.raises(StoreError, match="names no store: an older version wrote it"):
        splits(path)
    assert ["names no store" in problem for problem in problems(explorer, path)] == [True]


def test_by_the_command_line(run: Path, explorer: Explorer, tmp_path: Path) -> None:
    out, asked = tmp_path / "one.html", explorer.query.row(ROW).id
    invoke("report", run, "--id", str(asked), "--curvature", "none", "--out", out)
    assert list(read_page(out)["answers"]["byQuery"]) == [str(ROW)]
    assert "all well" in invoke("store", "verify", run, "--report", out).stderr
    changed(out, lambda content: content["overview"].update(title="another run"))
    failed = invoke("store", "verify", run, "--report", out, "--json", code=1)
    assert "was changed since it was written" in json.loads(failed.stdout)[str(out)][0]
    refused = invoke("store", "verify", run / "train", "--report", out, code=2)
    assert "report: goes with one run's folder" in refused.stderr
