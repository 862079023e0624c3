"""Answers are those of the stores: checked against sums over decoded features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import Expected, inner_products, multilinear
from explored import FAILED, HOSTILE, STEPS, write_split
from stepinfluence import Fisher
from stepinfluence.app.view.explore import Explorer
from stepinfluence.app.view.explore.everything import reverse
from stepinfluence.app.view.explore.page import saved_answers
from stepinfluence.errors import FeatureMismatchError, StoreError
from stepinfluence.search import scores
from torch import Tensor

pytestmark = pytest.mark.numeric

KEPT = np.arange(40) != FAILED


def held_against(explorer: Explorer, query: int, equation: str = "nsd,td->nst", rows: object = KEPT) -> Expected:
    """What is expected of sums over checkpoints, straight from equation 9."""
    etas = [c.eta for c in explorer.train.checkpoints]
    left = [explorer.train.features(k).values[rows] for k in range(len(etas))]
    right = [explorer.query.features(k, [query]).values[0] for k in range(len(etas))]

    def plain(*v: Tensor) -> Tensor:
        return sum(eta * torch.einsum(equation, v[k], v[k + len(etas)]) for k, eta in enumerate(etas))  # type: ignore[return-value]

    return multilinear(plain, *left, *right, rows=False)


def expected(explorer: Explorer, query: int) -> np.ndarray:
    """``(n_train, train steps, query steps)`` in float64."""
    return np.asarray(held_against(explorer, query, rows=slice(None)).exact)


def check_share(found: float, exact: Tensor, moved: Tensor) -> None:
    """``moved``: by how much what is divided, and what it is divided by, may be off, relative to the latter."""
    assert abs(found - float(exact)) <= 2 * float(moved)
    assert 2 * moved < 1e-3 * exact.abs(), "cannot fail: a mistake of a thousandth goes unnoticed"


def test_scores_are_sdi_summed_over_checkpoints(explorer: Explorer) -> None:
    scores = explorer.scores(3)
    assert np.isnan(scores[FAILED]).all()
    held_against(explorer, 3, "nsd,td->nt").check(torch.as_tensor(scores[KEPT]))


def test_scores_of_one_parameter_and_the_rest_add_up(explorer: Explorer) -> None:
    parts = [explorer.scores(3, name) for name in explorer.overview()["parameters"]]
    held_against(explorer, 3, "nsd,td->nt").check(torch.as_tensor(sum(parts)[KEPT]))


@pytest.mark.parametrize(("first", "last"), [(1, None), (2, 4), (6, 6)])
def test_top_ranks_by_the_chosen_steps(explorer: Explorer, first: int, last: int | None) -> None:
    found = explorer.top(3, k=5, first=first, last=last)
    want = expected(explorer, 3).sum(1)[:, first - 1 : last].sum(1)
    want[FAILED] = 0
    assert [e["row"] for e in found["helpful"]] == np.argsort(-want)[:5].tolist()
    assert [e["row"] for e in found["harmful"]] == np.argsort(want)[:5].tolist()
    assert all(e["row"] != FAILED for side in found.values() for e in side)
    assert all(len(e["sdi"]) == STEPS for side in found.values() for e in side)


def test_curve_is_energy_and_signed_sum(explorer: Explorer) -> None:
    want = held_against(explorer, 3, "nsd,td->nt")
    curve = explorer.curve(3)
    energy = Expected(*(values.abs().sum(0) for values in (want.exact, want.plain, want.magnitude)), rows=False)
    energy.check(torch.as_tensor(curve["energy"]))
    held_against(explorer, 3, "nsd,td->t").check(torch.as_tensor(curve["signed"]))
    late, total = energy.exact[3:].sum(), energy.exact.sum()
    check_share(curve["lateMass"], late / total, energy.allowed.sum() / total)
    assert curve["helpful"] + curve["harmful"] == 39


def test_pair_has_the_step_matrix_and_parameters(explorer: Explorer) -> None:
    pair = explorer.pair(3, 5)
    held_against(explorer, 3, rows=[5]).check(torch.as_tensor(pair["matrix"])[None])
    by_step = held_against(explorer, 3, "nsd,td->t", rows=[5])
    by_parameter = np.sum([p["sdi"] for p in pair["parameters"]], 0)
    for found in (pair["sdi"], np.sum(pair["matrix"], 0), by_parameter):
        by_step.check(torch.as_tensor(found))


def test_steps_that_an_example_did_not_take_are_not_shown(tmp_path: Path) -> None:
    write_split(tmp_path / "train", 12, per_step=True, seed=1, depths=True)
    write_split(tmp_path / "test", 6, per_step=True, seed=2, depths=True)
    explorer = Explorer.open(tmp_path)
    for row in range(3):
        taken = 1 + row % STEPS
        curve, top = explorer.curve(row), explorer.top(row, k=12)
        assert len(curve["energy"]) == len(curve["signed"]) == taken
        assert {len(e["sdi"]) for some in top.values() for e in some} == {taken}
        pair = explorer.pair(row, 1)
        assert np.shape(pair["matrix"]) == (2, taken)
        assert len(pair["sdi"]) == len(pair["byCheckpoint"][0]) == len(pair["parameters"][0]["sdi"]) == taken
        everywhere = reverse(explorer, 0, k=6)
        assert all(len(e["sdi"]) == 1 + e["row"] % STEPS for e in everywhere["helpful"] + everywhere["harmful"])
    page = saved_answers(explorer, queries=1, progress=False)["byQuery"]["0"]["scores"]
    assert {len(e["sdi"]) for some in page.values() for e in some["examples"]} == {1}
    assert {len(part) for some in page.values() for e in some["examples"] for part in e["parts"]} == {1}


def test_compare_correlates_all_rows(explorer: Explorer) -> None:
    sides = [held_against(explorer, q, "nsd,td->n") for q in (3, 4)]
    found = explorer.compare(3, 4, k=6)
    want = torch.corrcoef(torch.stack([side.exact for side in sides]))[0, 1]
    moved = sum(side.allowed.norm() / (side.exact - side.exact.mean()).norm() for side in sides)
    check_share(found["correlation"], want, moved)
    assert len(found["points"]) == 6


def test_queries_are_found_by_id_and_text(explorer: Explorer) -> None:
    assert explorer.queries()["total"] == 9
    assert [q["row"] for q in explorer.queries(offset=2, limit=3)["items"]] == [2, 3, 4]
    assert [q["row"] for q in explorer.queries(find="ID 3")["items"]] == [3]
    assert [q["row"] for q in explorer.queries(find="onerror")["items"]] == [1, 7]
    failed = explorer.queries()["items"][FAILED]
    assert failed["failed"]
    assert failed["loss"] is None


def test_texts_are_cut_in_lists_and_whole_in_examples(explorer: Explorer) -> None:
    assert len(explorer.queries()["items"][3]["text"]) == 301
    assert explorer.example("query", 3)["text"] == HOSTILE[3]
    assert "\u202e" not in explorer.example("query", 2)["text"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: e.top(99), "query: got row 99; there are rows 0 to 8"),
        (lambda e: e.top(FAILED), "has no features"),
        (lambda e: e.top(1, first=3, last=2), "steps: got 3 to 2"),
        (lambda e: e.top(1, last=7), "use steps from 1 to 6"),
        (lambda e: e.top(1, k=0), "k: got 0"),
        (lambda e: e.top(1, parameters="nothing*"), "parameters"),
        (lambda e: e.pair(1, -1), "train: got row -1"),
        (lambda e: e.example("other", 1), "side: got 'other'"),
        (lambda e: e.queries(limit=0), "limit"),
    ],
)
def test_wrong_questions_are_refused(explorer: Explorer, call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(explorer)  # type: ignore[operator]


def test_summed_training_rows_have_trajectories_but_no_matrix(tmp_path: Path) -> None:
    write_split(tmp_path / "train", 10, per_step=False, seed=1)
    write_split(tmp_path / "test", 3, per_step=True, seed=2)
    explorer = Explorer.open(tmp_path)
    assert explorer.pair(0, 1)["matrix"] is None
    assert len(explorer.pair(0, 1)["sdi"]) == STEPS


def test_runs_that_cannot_be_shown_say_why(tmp_path: Path, run: Path) -> None:
    with pytest.raises(StoreError, match="no such run folder"):
        Explorer.open(tmp_path / "none")
    with pytest.raises(StoreError, match=r"has no split 'training' \(it has test, train\); use --train"):
        Explorer.open(run, train="training")
    write_split(tmp_path / "train", 4, per_step=False, seed=1)
    with pytest.raises(StoreError, match="has no other split stored per step; name the queries' split with --query"):
        Explorer.open(tmp_path)
    write_split(tmp_path / "summed", 4, per_step=False, seed=1)
    with pytest.raises(StoreError, match="holds rows summed over steps"):
        Explorer.open(tmp_path, query="summed")
    write_split(tmp_path / "one", 4, per_step=True, seed=1, checkpoints=1)
    with pytest.raises(FeatureMismatchError, match="has 1 checkpoints"):
        Explorer.open(tmp_path, query="one")


def test_the_cache_forgets_the_oldest(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepinfluence.app.view.explore.scored.CACHE_BYTES", 2 * 40 * STEPS * 4)
    first = explorer.scores(0)
    for row in (1, 2):
        explorer.scores(row)
    assert len(explorer.scored._scores) == 2
    assert explorer.scores(0) is not first
    np.testing.assert_array_equal(explorer.scores(0), first)


def test_a_checkpoint_that_owns_the_energy_is_named(tmp_path: Path, explorer: Explorer) -> None:
    curve = explorer.curve(3)
    energies = []
    for k, checkpoint in enumerate(explorer.train.checkpoints):
        sides = explorer.train.features(k).values[KEPT], explorer.query.features(k, [3]).values[0]
        energies.append(inner_products("nsd,td->nt", *sides, scale=checkpoint.eta))
    total = sum(energy.exact.abs().sum() for energy in energies)
    for share, energy in zip(curve["shares"], energies, strict=True):
        check_share(share, energy.exact.abs().sum() / total, sum(e.allowed.sum() for e in energies) / total)
    assert sum(curve["shares"]) == pytest.approx(1)
    assert curve["dominance"] == ""  # 0.1 against 0.2, of gradients alike
    write_split(tmp_path / "train", 10, per_step=True, seed=1, etas=(0.1, 90.0))
    write_split(tmp_path / "test", 3, per_step=True, seed=2, etas=(0.1, 90.0))
    owned = Explorer.open(tmp_path).curve(1)
    assert owned["shares"][1] > 0.98
    assert owned["dominance"].startswith("Checkpoint step-1.pt holds 99.")


def test_corrected_scores_come_first_and_sdi_beside_them(corrected: Explorer, explorer: Explorer) -> None:
    assert [score["key"] for score in corrected.overview()["scores"]] == ["corrected", "sdi"]
    assert [score["key"] for score in explorer.overview()["scores"]] == ["sdi"]
    fits = [Fisher.fit(corrected.train, checkpoint=k, damping=0.1) for k in (0, 1)]
    features = [corrected.query.features(k, [3]) for k in (0, 1)]
    want = scores(corrected.train, features, curvature=fits, progress=False).sdi[:, 0].numpy()
    np.testing.assert_array_equal(corrected.scores(3), want)
    np.testing.assert_array_equal(corrected.scores(3, score="sdi"), explorer.scores(3))
    assert not np.allclose(want[KEPT], explorer.scores(3)[KEPT], rtol=0.1)
    for score in ("", "corrected", "sdi"):
        found = corrected.top(3, k=5, score=score)["helpful"]
        total = corrected.scores(3, score=score).sum(1)
        assert [e["row"] for e in found] == np.argsort(-np.nan_to_num(total))[:5].tolist()
        pair = corrected.pair(3, 5, score=score)
        left = [corrected.train.features(k, [5]).values.double() for k in (0, 1)]
        right = [
            (features[k] if score == "sdi" else fits[k].transform(features[k])).values[0].double() * eta
            for k, eta in enumerate((0.1, 0.2))
        ]
        exact, size = (
            sum(torch.einsum("nsd,td->t", *sides) for sides in zip(*both, strict=True)).numpy()  # type: ignore[union-attr]
            for both in ((left, right), ([a.abs() for a in left], [b.abs() for b in right]))
        )
        allowed = 16 * np.finfo(np.float32).eps * size
        assert (allowed < 1e-2 * np.abs(exact)).any(), "cannot fail"
        for parts in (pair["matrix"], [p["sdi"] for p in pair["parameters"]], [pair["sdi"]]):
            assert (np.abs(np.sum(parts, 0) - exact) <= allowed).all()
        signed = torch.from_numpy(corrected.scores(3, score=score)).nansum(0).numpy()
        np.testing.assert_array_equal(corrected.curve(3, score=score)["signed"], signed)
    assert corrected.compare(3, 4)["points"] != corrected.compare(3, 4, score="sdi")["points"]
    with pytest.raises(ValueError, match="score: got 'best'; use corrected or sdi"):
        corrected.top(3, score="best")


def test_a_saved_page_holds_both_scores(corrected: Explorer) -> None:
    saved = saved_answers(corrected, queries=1, progress=False)["byQuery"]["0"]["scores"]
    for score, kept in saved.items():
        assert kept["curve"] == corrected.curve(0, score=score)
        assert kept["examples"][0]["row"] == corrected.top(0, k=1, score=score)["helpful"][0]["row"]
    assert list(saved) == ["corrected", "sdi"]
    assert saved["sdi"] != saved["corrected"]
