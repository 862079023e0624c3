"""The page on the architecture says what the code is: its picture, its rooms, and where new things go."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import architecture
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS, PLACES = (part.split("\n## ")[0] for part in PAGE.split("\n## ")[1:3])
NEW = [line for line in PLACES.splitlines() if line.startswith("| ") and "| goes into |" not in line]


def test_the_picture_is_of_the_imports() -> None:
    drawn = architecture.PICTURE.read_text(encoding="utf-8")
    assert drawn == architecture.picture(), "run python docs/_site/architecture.py"
    shown = {e.text for e in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}  # noqa: S314  # ours
    assert shown == set(architecture.rooms())


def test_each_room_has_its_sentence() -> None:
    told = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", ROOMS, re.MULTILINE)
    assert sorted(name for name, _ in told) == sorted(architecture.rooms())
    assert all(len(sentence) > 20 for _, sentence in told)


@pytest.mark.parametrize("line", NEW, ids=lambda line: line.split("|")[1].strip())
def test_places_are_there(line: str) -> None:
    """Each path exists, and each name is one that some file of the row's places has."""
    _, _, places, through, tests, _ = line.split("|")
    words = re.findall(r"`([^`]+)`", places + through + tests)
    paths = [ROOT / word for word in words if "/" in word]
    assert len(paths) >= 2
    for path in paths:
        assert path.exists(), path
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for name in set(words) - {word for word in words if "/" in word}:
        assert re.search(rf"\b{re.escape(name)}\b", code), name


def test_floors_and_direct_imports() -> None:
    graph = {"top": {"middle", "base"}, "middle": {"base"}, "aside": {"base"}, "base": set[str]()}
    assert architecture.floors(graph) == [["base"], ["aside", "middle"], ["top"]]
    assert architecture.direct(graph) == {"top": {"middle"}, "middle": {"base"}, "aside": {"base"}, "base": set()}
