"""How close sketched influence comes to exact influence, on a trained looped GPT (paper, section 5 and Figure 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import Rounding, measure_body
from stepinfluence import ExactCapture, Features, attach, influence
from stepinfluence.models import LoopedGPT, LoopedGPTConfig, gpt_loss
from torch import Tensor

from sdi_kernels import HashFamily, TensorSketch, sketch_matrix_grads

SIZES = [256, 512, 1024, 2048, 4096, 8192]
SEEDS = range(24)
VOCABULARY, TOKENS = 80, 64


@dataclass
class Trained:
    model: LoopedGPT
    train: list[dict[str, Tensor]]
    query: list[dict[str, Tensor]]
    exact_train: Features
    exact_query: Features
    sdi: Tensor


def excerpts(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Passages of the licence text, by characters."""
    text = (Path(__file__).parents[3] / "LICENSE").read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    assert len(alphabet) <= VOCABULARY
    codes = torch.tensor([alphabet.index(c) for c in text])
    starts = torch.randint(0, len(codes) - TOKENS - 1, (size, 1), generator=generator)
    window = codes[starts + torch.arange(TOKENS + 1)]
    return {"tokens": window[:, :-1].contiguous(), "targets": window[:, 1:].contiguous()}


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A looped GPT that has learned what is common to all passages, not yet what tells them apart.

    Relative error is the sketch's noise, which goes by the norms of two gradients, over their inner product: it grows
    as the gradients of different examples turn away from each other in training (fivefold in 100 more steps here),
    whatever sketches them. The bound on the noise itself is tested below, too.
    """
    torch.manual_seed(0)
    config = LoopedGPTConfig(
        vocab_size=VOCABULARY, d_model=96, n_heads=4, sequence_len=TOKENS, n_prelude=1, n_core=2, n_coda=0, steps=4
    )
    model = LoopedGPT(config)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss = gpt_loss(model, excerpts(32, generator)).mean()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    assert float(loss.detach()) < 0.8 * math.log(VOCABULARY)
    train, query = [excerpts(3, generator) for _ in range(2)], [excerpts(4, generator)]
    exact = ExactCapture(model, body="core")
    exact_train = exact.featurize(train, gpt_loss, per_step=False)
    exact_query = exact.featurize(query, gpt_loss)
    return Trained(model, train, query, exact_train, exact_query, influence(exact_train, exact_query).sdi)


def sketch(features: Features, size: int, hashing: HashFamily, seed: int) -> Tensor:
    """TensorSketch of exact gradients, by its definition; that a capture gives the same is tested below."""
    columns = []
    for block in features.space.blocks:
        tables = TensorSketch(*block.shape, size, seed=seed, name=block.name, hashing=hashing)
        (h_out, s_out), (h_in, s_in) = (
            (torch.from_numpy(side.bucket), torch.from_numpy(side.sign)) for side in (tables.out, tables.inp)
        )
        place = (h_out[:, None] + h_in).remainder(size).flatten()
        signs = (s_out[:, None] * s_in).flatten().float()
        rows = features.values[..., block.start : block.stop].flatten(0, -2)
        out = torch.zeros(len(rows), size).index_add_(1, place, rows * signs)
        columns.append(out.unflatten(0, features.values.shape[:-1]))
    return torch.cat(columns, -1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def estimates(trained: Trained) -> dict[tuple[str, int], Tensor]:
    """Sketched SDI by hash family and sketch size, one for each seed: ``(seeds, n_train, n_query, steps)``."""
    found: dict[tuple[str, int], Tensor] = {}
    families: tuple[HashFamily, ...] = ("balanced", "iid")
    for hashing in families:
        for size in SIZES:
            scores = []
            for seed in SEEDS:
                train = sketch(trained.exact_train, size, hashing, seed)
                query = sketch(trained.exact_query, size, hashing, seed)
                scores.append(torch.einsum("nd,qtd->nqt", train, query))
            found[hashing, size] = torch.stack(scores)
    return found


@pytest.fixture(scope="module")
def errors(trained: Trained, estimates: dict[tuple[str, int], Tensor]) -> dict[tuple[str, int], float]:
    """Relative error of the whole SDI tensor (Frobenius norm), root mean square over seeds."""
    size = trained.sdi.norm()
    return {
        key: float(((found - trained.sdi).flatten(1).norm(dim=1) / size).square().mean().sqrt())
        for key, found in estimates.items()
    }


def test_error_at_the_paper_s_sketch_size(errors: dict[tuple[str, int], float]) -> None:
    assert errors["balanced", 2048] <= 0.04


@pytest.mark.parametrize("hashing", ["balanced", "iid"])
def test_error_falls_with_the_square_root(errors: dict[tuple[str, int], float], hashing: str) -> None:
    x = torch.tensor(SIZES, dtype=torch.float64).log()
    y = torch.tensor([errors[hashing, m] for m in SIZES], dtype=torch.float64).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert -0.6 <= slope <= -0.4


@pytest.mark.parametrize("size", SIZES)
def test_balanced_is_better_than_iid(errors: dict[tuple[str, int], float], size: int) -> None:
    assert errors["balanced", size] < errors["iid", size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("hashing", "bound"), [("balanced", 2.0), ("iid", 6.0)])
def test_noise_keeps_its_bound(
    trained: Trained, estimates: dict[tuple[str, int], Tensor], hashing: str, bound: float, size: int
) -> None:
    """Mean squared error against the variance bounds of either family, whatever the gradients' directions."""
    variance = torch.zeros_like(trained.sdi)
    for block in trained.exact_train.space.blocks:
        x = trained.exact_train.values[:, block.start : block.stop].square().sum(-1)
        y = trained.exact_query.values[..., block.start : block.stop].square().sum(-1)
        variance += torch.einsum("n,qt->nqt", x, y)
    # Where a side is longer than the sketch, balanced hashing collides too: its bound lies between the two.
    factor = bound if size >= 384 or hashing == "iid" else 6.0
    variance *= factor / (size - 1) + factor / (size - 1) ** 2
    assert float((estimates[hashing, size] - trained.sdi).square().mean(0).sum() / variance.sum()) <= 1.0


@pytest.fixture(scope="module")
def rounding(trained: Trained) -> list[Rounding]:
    """Of both sides: what plain torch loses on this model."""
    names = [block.name for block in trained.exact_train.space.blocks]
    return [
        measure_body(trained.model, side, gpt_loss, trained.model.core, names)
        for side in (trained.train, trained.query)
    ]


@pytest.mark.numeric
@pytest.mark.parametrize("hashing", ["balanced", "iid"])
def test_capture_gives_these_sketches(trained: Trained, rounding: list[Rounding], hashing: Any) -> None:
    capture = attach(trained.model, body="core", sketch_size=2048, seed=1, hashing=hashing)
    tables = {t.name: t.sketch for t in capture.targets}
    query = capture.featurize(trained.query, gpt_loss)
    rounding[1].check_sketches(query.values, "query:", tables, per_step=True)
    rounding[1].check_sketches(sketch(trained.exact_query, 2048, hashing, 1), "exact:", tables, per_step=True)
    train = capture.featurize(trained.train, gpt_loss, per_step=False)
    rounding[0].check_sketches(train.values, "train:", tables, per_step=False)
    assert relative(influence(train, query).sdi, trained.sdi) <= 0.06


@pytest.mark.numeric
@pytest.mark.parametrize("route", ["auto", "direct", "fft"])
def test_conservation(trained: Trained, rounding: list[Rounding], route: Any) -> None:
    """Steps add up: to the summed features, and to the sketch of the gradient of the whole model (paper, eq. 2)."""
    capture = attach(trained.model, body="core", sketch_size=512, route=route)
    tables = {t.name: t.sketch for t in capture.targets}
    steps = capture.featurize(trained.query, gpt_loss).values
    rounding[1].check_sketches(steps.double().sum(1), "sum of the steps:", tables, per_step=False)
    summed = capture.featurize(trained.query, gpt_loss, per_step=False).values
    rounding[1].check_sketches(summed, "summed:", tables, per_step=False)
    for wrong in (steps[:, 1:].sum(1), steps.sum(1) + steps[:, 0]):
        with pytest.raises(AssertionError, match="times what is allowed"):
            rounding[1].check_sketches(wrong, "", tables, per_step=False)
    (batch,) = trained.query
    parameters = [trained.model.get_parameter(n) for n in tables]
    rows = []
    for index in range(len(steps)):
        loss = gpt_loss(trained.model, {k: v[index : index + 1] for k, v in batch.items()}).sum()
        grads = torch.autograd.grad(loss, parameters)
        columns = [sketch_matrix_grads(g, tables[n]) for n, g in zip(tables, grads, strict=True)]  # type: ignore[arg-type]
        rows.append(torch.cat(columns))
    rounding[1].check_sketches(torch.stack(rows), "whole gradient:", tables, per_step=False)
