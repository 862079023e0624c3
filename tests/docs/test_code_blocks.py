"""Every Python block of the documentation runs, in order, one namespace for each page."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call ``run``: made as the command line's page says, once for all pages."""
    folder = tmp_path_factory.mktemp("docs")
    sdi = [sys.executable, "-m", "stepinfluence"]
    for command in (
        ["init", "my_project.py", "--template", "blank"],
        ["featurize", "--project", "my_project.py", "--split", "train", "--split", "query", "--out", "run"],
    ):
        subprocess.run([*sdi, *command], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of packages, as imported
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    document = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT)).parse(page)
    examples = list(document.examples())
    assert examples, f"{page.name}: no code block was recognised"
    for example in examples:
        example.evaluate()


def test_there_is_documentation_with_code() -> None:
    assert {p.name for p in WITH_CODE} >= {"README.md", "tutorial.md"}
