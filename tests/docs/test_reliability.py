"""Every test that the table of faults names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_named_test_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (ROOT / "docs/reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    missing = [f"{file}::{test}" for file, test in named if not _has(ROOT / "tests" / file, test)]
    assert not missing


def _has(path: Path, test: str) -> bool:
    return path.is_file() and re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE) is not None
