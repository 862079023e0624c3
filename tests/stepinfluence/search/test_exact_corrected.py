"""Exact scores corrected for curvature, against exact gradients and the inverse of their Fisher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from looped_examples import Examples, N, Q, featurized, search, setting
from stepinfluence import ExactCapture, influence
from stepinfluence.search import Recompute, ask, exact_rows, two_stage
from torch import Tensor


def dense(seed: int, train: Examples, query: Examples, damping: float) -> Tensor:
    """``(N, Q, steps)``: exact gradients, their Fisher as a matrix, and its damped inverse, of ``setting(seed)``."""
    model = setting(seed)[0].model
    exact = ExactCapture(model, body="core")
    g = exact.featurize([train.batch], zoo.squared_error, per_step=False).values
    phi = exact.featurize([query.batch], zoo.squared_error).values
    fisher = g.T @ g / len(g)
    damped = fisher + damping * torch.linalg.eigvalsh(fisher)[-1] * torch.eye(g.shape[1], dtype=g.dtype)
    return torch.einsum("nd,qsd->nqs", g, torch.linalg.solve(damped, phi.flatten(0, 1).T).T.view_as(phi))


@pytest.mark.parametrize(
    "options", [{}, {"query_bytes": 1, "batch_size": 3}, {"steps": slice(1, 3)}, {"harmful": True}]
)
def test_scores_corrected_for_curvature_are_exact_too(options: dict[str, Any]) -> None:
    capture, train, query, _ = setting(sketch_size=16)
    found = search(capture, train, query, 5, candidates=5, curvature="fisher", damping=0.01, **options)
    full = dense(0, train, query, 0.01)
    ranked = full[..., options.get("steps", slice(None))].sum(2)
    sign = -1 if options.get("harmful") else 1
    assert found.top.rows.tolist() == (sign * ranked).topk(5, 0).indices.T.tolist()
    wanted = torch.stack([full[rows, q] for q, rows in enumerate(found.top.rows)])
    # In float64, then rounded once.
    torch.testing.assert_close(found.top.sdi, wanted.float(), rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    assert found.candidates.tolist() == [list(range(N))] * Q
    sketched = influence(
        featurized(capture, train, per_step=False), featurized(capture, query, per_step=True), curvature="fisher",
        damping=0.01,
    ).sdi[..., options.get("steps", slice(None))].sum(2)  # fmt: skip
    for q, rows in enumerate(found.top.rows):
        assert found.estimates[q].tolist() == pytest.approx(sketched[rows, q].tolist(), rel=1e-4)
    assert not torch.allclose(found.estimates.double(), wanted.sum(2), rtol=1e-2), "sketches of this size err"


def test_each_checkpoint_has_an_exact_curvature_of_its_own(tmp_path: Path) -> None:
    capture, train, query, _ = setting()
    paths, features, etas = [], [], [0.1, 0.4]
    for seed in (1, 2):
        other, *_ = setting(seed)
        paths.append(tmp_path / f"{seed}.pt")
        torch.save(other.model.state_dict(), paths[-1])
        features.append([featurized(other, data, per_step=side == 1) for side, data in enumerate((train, query))])
    sides = [[f[side] for f in features] for side in (0, 1)]
    exact = Recompute(capture, zoo.squared_error, train, query, checkpoints=paths)
    question = ask(*sides, etas=etas, curvature="fisher", damping=0.1)
    found = two_stage(question, 5, exact=exact)
    full = sum(eta * dense(seed, train, query, 0.1) for eta, seed in zip(etas, (1, 2), strict=True))
    assert found.top.rows.tolist() == full.sum(2).topk(5, 0).indices.T.tolist()
    rows = torch.tensor([[0, 7, -1], [3, -1, -1], [39, 2, 1]]).sort(1).values.flip(1)
    some = exact_rows(question, rows, exact=exact)
    wanted = torch.stack([full[r.clamp(min=0), q] * (r >= 0).unsqueeze(1) for q, r in enumerate(rows)])
    torch.testing.assert_close(some, wanted.float(), rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_curvatures_that_have_no_exact_scores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, train, query, _ = setting()
    with pytest.raises(ValueError, match=r"^curvature: exact scores are corrected for curvature='fisher' only"):
        search(capture, train, query, 4, curvature="block", damping=0.1)
    sides = [featurized(capture, data, per_step=data is query) for data in (train, query)]
    exact = Recompute(capture, zoo.squared_error, train, query)
    some = ask(*sides, curvature="fisher", damping=0.1, parameters="*weight")
    with pytest.raises(ValueError, match=r"^parameters: exact scores are corrected over all parameters"):
        two_stage(some, 4, exact=exact)
    monkeypatch.setattr("stepinfluence.search.exact_corrected.EXACT_SIDE", N - 1)
    with pytest.raises(ValueError, match=r"^curvature: exact scores need the inner products of all 40 training rows"):
        search(capture, train, query, 4, curvature="fisher", damping=0.1)
