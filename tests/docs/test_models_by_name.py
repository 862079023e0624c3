"""The blocks of docs/models.md give the features that autograd gives, example by example and step by step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from compare import FLOAT64, relative
from rounding import joined
from stepinfluence.capture.session import seed_batch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
SHARED, *REST = re.split(r"^## ", PAGE, flags=re.MULTILINE)
MODELS = {part.partition("\n")[0]: part for part in REST}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_page_has_them_all() -> None:
    assert set(MODELS) == {
        "ALBERT", "Universal Transformer", "Ouro", "Huginn", "TRM", "URM", "Mixture-of-recursions", "HRM",
    }  # fmt: skip
    for name in MODELS:
        assert f"[{name}](#{name.lower().replace(' ', '-')})" in SHARED


@pytest.mark.filterwarnings("ignore")  # of the packages and what they import
@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_autograd(name: str) -> None:
    known: dict[str, Any] = {}
    try:
        for block in (*BLOCK.findall(SHARED), *BLOCK.findall(MODELS[name])):
            exec(block, known)  # noqa: S102  # the page's own code
    except ImportError as error:
        if name != "HRM":
            raise
        pytest.skip(str(error))
    model, capture, features, batches = (known[k] for k in ("model", "capture", "features", "batches"))
    model.train(capture.training)
    tables = {t.name: t.sketch for t in capture.targets}
    gradients = [
        oracle.step_gradients(
            model,
            batch,
            known["loss_fn"],
            body=capture.tapped.steps.body,
            names=list(tables),
            loop=capture.tapped.steps.loop,
            whole_batch=(lambda k=k: seed_batch(1, k)) if capture.training else None,  # a start state of noise
        )
        for k, batch in enumerate(batches)
    ]
    expected = oracle.sketched(joined(gradients), tables)
    assert features.values.shape == expected.shape
    assert relative(features.values, expected) <= FLOAT64
    active = (expected != 0).any(-1)
    assert bool(active.any(1).all())
    assert features.lengths.tolist() == (torch.arange(1, active.shape[1] + 1) * active).amax(1).tolist()
