"""What the report and the explorer share is there once."""

from __future__ import annotations

import re
from importlib import resources

import pytest
from stepinfluence.app.view.explore.page import SCRIPTS

VIEW = resources.files("stepinfluence.app.view")
BASE = (VIEW / "assets" / "base.js").read_text(encoding="utf-8")


def defined(script: str) -> set[str]:
    """Names at a script's top level."""
    return set(re.findall(r"^(?:async )?(?:function|const|let) ([$\w]+)", script, re.MULTILINE))


@pytest.mark.parametrize("page", ["report", "explore"])
def test_no_helper_is_defined_twice(page: str) -> None:
    parts = SCRIPTS if page == "explore" else (page,)
    script = "".join((VIEW / page / "assets" / f"{part}.js").read_text(encoding="utf-8") for part in parts)
    names = re.findall(r"^(?:async )?(?:function|const|let|class) ([$\w]+)", script, re.MULTILINE)
    assert len(names) == len(set(names)), "two of its scripts define the same name"
    assert {"$", "esc", "element", "draw", "heatmap"} <= defined(BASE)
    assert defined(BASE) & defined(script) == set()
    unused = {name for name in defined(BASE) if not re.search(rf"(?<![$\w]){re.escape(name)}(?![$\w])", script)}
    assert unused <= {"root", "minus", "layout", "limits", "round", "draw", "css"}, "shared by one page only"
