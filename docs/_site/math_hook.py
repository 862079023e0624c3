"""Formulas as MathML, made when the site is built: browsers draw it themselves, no script, no download.

The sources keep GitHub's notation ($`...`$ in a line, ```math blocks), so that the pages read well there too.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"\$`(.+?)`\$")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the formulas of a page."""
    markdown = BLOCK.sub(lambda m: f'<div class="math">{convert(m[1].strip(), display="block")}</div>', markdown)
    # A vertical bar ends the cell of a table; the entity does not.
    return INLINE.sub(lambda m: convert(m[1]).replace("|", "&#x7C;"), markdown)
