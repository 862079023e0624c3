"""Given the published package's hash tables, this project's sketches and SDI are the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding import influence_of_sketches, measure_body
from stepinfluence import Capture, attach, influence
from stepinfluence.models import LoopedGPT, LoopedGPTConfig, gpt_loss
from torch import Tensor

from sdi_kernels import CountSketch, TensorSketch

pytestmark = pytest.mark.numeric

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
    tables = {t.name: t.sketch for t in capture.targets}
    rounding = [measure_body(model, side, gpt_loss, model.core, list(tables)) for side in (train, query)]
    for found, expected, of in zip(ours, theirs, rounding, strict=True):
        assert {b.name for b in found.space.blocks} == set(expected.phi)
        of.check_sketches(found.values, "ours:", tables, per_step=True)
        published_values = torch.cat([expected.phi[b.name] for b in found.space.blocks], -1)
        of.check_sketches(published_values, "the package's:", tables, per_step=True)
    scores, package = influence(*ours), sdi.estimators
    sides = {"train": theirs[0], "query": theirs[1]}
    for what, found, published_found in (
        ("query", scores.sdi, package.compute_query_sdi(**sides)),
        ("both", influence(*ours, decompose="both").sdi, package.compute_step_matrix(**sides)),
        ("none", scores.tracin, package.compute_tracin(**sides)),
    ):
        expected = influence_of_sketches(*rounding, tables, steps=what)
        expected.check(found, f"ours, {what}:")
        expected.check(published_found, f"the package's, {what}:")
