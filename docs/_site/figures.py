"""Rewrite the parts of README and docs that state measured figures, from the files in which the figures are kept.

python docs/_site/figures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kept import MARK, ROOT, Parts, rewritten
from parts_attack import PARTS as ATTACK
from parts_bench import PARTS as BENCH
from parts_curvature import PARTS as CURVATURE
from parts_evaluation import PARTS as EVALUATION
from parts_models import PARTS as MODELS
from parts_readme import PARTS as README
from parts_store import PARTS as STORE
from parts_uses import PARTS as USES

PARTS: Parts = {**README, **STORE, **BENCH, **MODELS, **CURVATURE, **EVALUATION, **ATTACK, **USES}
PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def marked() -> list[Path]:
    """Pages with parts that are made from kept results."""
    return [page for page in PAGES if MARK.search(page.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    for page in marked():
        page.write_text(rewritten(page.read_text(encoding="utf-8"), PARTS), encoding="utf-8")
