"""Given the published package's hash tables, this project's sketches and SDI are the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepinfluence import Capture, attach, influence
from stepinfluence.models import LoopedGPT, LoopedGPTConfig, gpt_loss
from torch import Tensor

from sdi_kernels import CountSketch, TensorSketch

sdi = pytest.importorskip("sdi", reason="the published package (extra: test)")

SKETCH_SIZE = 128


def batches(sizes: list[int], seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{key: torch.randint(31, (size, 7), generator=generator) for key in ("tokens", "targets")} for size in sizes]


def adopt_tables(capture: Capture, published: Any) -> None:
    """Give every target the published package's tables. Sketches are fixed when a capture is made, on purpose."""
    specs = {**published._featurizer._tensor_specs, **published._featurizer._count_specs}
    for target in capture.targets:
        spec = specs[target.parameter]
        sketch: CountSketch | TensorSketch
        if hasattr(spec, "h_out"):
            sketch = TensorSketch.from_tables(spec.h_out, spec.s_out, spec.h_in, spec.s_in, spec.m)
        else:
            sketch = CountSketch.from_tables(spec.h, spec.s, spec.m)
        object.__setattr__(target, "sketch", sketch)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("route", ["auto", "direct", "fft"])
def test_sketches_and_influence(route: Any) -> None:
    torch.manual_seed(0)
    config = LoopedGPTConfig(
        vocab_size=31, d_model=24, n_heads=2, sequence_len=8, n_prelude=1, n_core=2, n_coda=0, steps=3, norm="layernorm"
    )
    model = LoopedGPT(config).eval()
    train, query = batches([4, 3], 1), batches([3], 2)
    capture = attach(model, body="core", sketch_size=SKETCH_SIZE, hashing="iid", route=route)
    published = sdi.ProjectedTracInSDI(model=model, target_modules=model.core, projection_size=SKETCH_SIZE, seed=5)
    theirs = [published.featurize_loader(loader=side, loss_fn=gpt_loss) for side in (train, query)]
    adopt_tables(capture, published)
    published.close()
    ours = [capture.featurize(side, gpt_loss) for side in (train, query)]
    for found, expected in zip(ours, theirs, strict=True):
        assert {b.name for b in found.space.blocks} == set(expected.phi)
        for block in found.space.blocks:
            assert relative(found.values[..., block.start : block.stop], expected.phi[block.name]) <= 1e-5
    scores = influence(*ours)
    assert relative(scores.sdi, sdi.estimators.compute_query_sdi(train=theirs[0], query=theirs[1])) <= 1e-5
    matrix = sdi.estimators.compute_step_matrix(train=theirs[0], query=theirs[1])
    assert relative(influence(*ours, decompose="both").sdi, matrix) <= 1e-5
    assert relative(scores.tracin, sdi.estimators.compute_tracin(train=theirs[0], query=theirs[1])) <= 1e-5
