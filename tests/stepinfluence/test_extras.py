"""A library that is missing is named with a command that installs it, of an extra that there is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import stepinfluence
import torch
from stepinfluence.search import index

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def scores() -> stepinfluence.Influence:
    model = torch.nn.Linear(2, 2)
    capture = stepinfluence.attach(model, body=model, sketch_size=8)
    features = capture.featurize([torch.randn(3, 2)], lambda model, x: model(x).square().sum(1), progress=False)
    return stepinfluence.influence(features, features)


@pytest.mark.parametrize(
    ("library", "use"),
    [
        ("matplotlib", lambda: scores().plot()),
        ("plotly", lambda: scores().plot(backend="plotly")),
        ("pandas", lambda: scores().to_pandas()),
        ("pandas", lambda: scores().top().to_pandas()),
        ("pyarrow", lambda: scores().to_arrow()),
        ("faiss", index._faiss),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    library: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    for drawn in ("with_matplotlib", "with_plotly"):
        monkeypatch.delitem(sys.modules, f"stepinfluence.display.{drawn}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        use()
    found = re.fullmatch(r"(\w+)[\w.]* is not installed: run pip install 'sdi-kernels\[(\w+)\]'", str(caught.value))
    assert found is not None, caught.value
    assert found[1] == library
    assert any(re.match(rf"{library}\b", need) for need in EXTRAS[found[2]])


def test_every_extra_that_a_message_names_exists() -> None:
    named = set()
    for file in (ROOT / "python").rglob("*.py"):
        named |= set(
            re.findall(r"(?:needed|need_extra|install_command)\(\"([\w,]+)\"", file.read_text(encoding="utf-8"))
        )
    assert {"notebook", "index"} <= named
    assert {extra for names in named for extra in names.split(",")} <= set(EXTRAS)
