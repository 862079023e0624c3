"""The page of the paper's numbers says what the kept results say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_made_from_the_kept_results() -> None:
    spec = importlib.util.spec_from_file_location("reproduction", ROOT / "docs/_site/reproduction.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    assert module.page() == written, "run: python docs/_site/reproduction.py"
