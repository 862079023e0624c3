"""Draw the figures that docs/tutorial.md shows: run its code, and keep every ``figure`` that it makes.

python docs/_site/tutorial_figures.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DRAWN = re.compile(r"^figure = .*?$", re.MULTILINE)
PICTURE = re.compile(r"\(images/(tutorial-[\w-]+\.png)\)")


def main() -> None:
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    names = iter(PICTURE.findall(text))
    known: dict[str, Any] = {}
    for block in BLOCK.findall(text):
        for line in DRAWN.findall(block):
            path = str(DOCS / "images" / next(names))
            block = block.replace(line, f"{line}\nfigure.savefig({path!r}, dpi=100, bbox_inches='tight')")
        exec(block, known)  # noqa: S102  # the page's own code
    assert next(names, None) is None, "the page shows a figure that its code does not draw"


if __name__ == "__main__":
    main()
