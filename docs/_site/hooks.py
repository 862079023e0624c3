"""Pages as the site shows them: formulas as MathML, which browsers draw without a script or a download.

The sources keep GitHub's notation ($`...`$ in a line, ```math blocks), so that the pages read well there too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>")
INLINE = re.compile(r"\$`(.+?)`\$")


def on_config(config: Any) -> Any:
    """Link the repository: pyproject.toml is the one place that has its address."""
    text = Path(config.config_file_path).with_name("pyproject.toml").read_text(encoding="utf-8")
    [url] = re.findall(r'^Repository = "(.+)"$', text, re.MULTILINE)
    if "/OWNER/" not in url:
        config.repo_url = url
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the formulas of a page."""
    markdown = BLOCK.sub(lambda m: f'<div class="math">{convert(m[1].strip(), display="block")}</div>', markdown)
    # A vertical bar ends the cell of a table; the entity does not.
    # The span keeps a formula at the start of a line from being taken for a block of HTML.
    return INLINE.sub(lambda m: f"<span>{convert(m[1])}</span>".replace("|", "&#x7C;"), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Docstrings name other objects in Sphinx's notation, which editors know; show the name alone."""
    return ROLE.sub(r"<code>\1</code>", content)
