"""The figures of docs/curvature.md and docs/curvature-evidence.md show the kept results."""

from __future__ import annotations

import json

import curvature_figures
import pytest

from reproduce.style import styled

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("name", curvature_figures.FIGURES)
def test_a_figure_shows_what_is_kept(name: str) -> None:
    with styled():
        _, numbers = curvature_figures.FIGURES[name]()
    with Image.open(curvature_figures.IMAGES / f"{name}.png") as image:
        drawn = json.loads(image.info["Description"])
    assert drawn == json.loads(json.dumps(numbers)), "run: python docs/_site/curvature_figures.py"
