"""Draw the figures that docs/tutorial.md and docs/depth.md show: run their code, and keep every ``figure`` it makes.

python docs/_site/tutorial_figures.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
PAGES = ("tutorial", "depth")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def draw(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    names = iter(re.findall(rf"\(images/({page}-[\w-]+\.png)\)", text))
    known: dict[str, Any] = {}
    for block in BLOCK.findall(text):
        exec(block, known)  # noqa: S102  # the page's own code
        if re.search(r"^figure = ", block, re.MULTILINE):
            known["figure"].savefig(DOCS / "images" / next(names), dpi=100, bbox_inches="tight")
    assert next(names, None) is None, f"{page}: shows a figure that its code does not draw"


if __name__ == "__main__":
    for page in PAGES:
        draw(page)
