"""Answers that come from the model itself, and those about all queries: checked against the library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stepinfluence import Fisher
from stepinfluence.app.runs.by_token import token_features
from stepinfluence.app.runs.stored import StoredRun
from stepinfluence.app.view.explore import Explorer
from stepinfluence.app.view.explore.agreement import agreement
from stepinfluence.app.view.explore.everything import overall, reverse
from stepinfluence.app.view.explore.model import exact, tokens
from stepinfluence.app.view.explore.page import saved_answers
from stepinfluence.app.view.explore.scored import leading
from stepinfluence.search import ask, exact_rows
from stepinfluence.search.noise import halves

pytestmark = pytest.mark.numeric


def test_exact_scores_are_those_of_the_one_exact_path(told: Explorer, words: Path) -> None:
    found = exact(told, 1, k=3, first=2)
    run = StoredRun.open(words)
    train, query = run.store("train"), run.store("query")
    rows = sorted(int(row) for row in found["rows"])
    question = ask(train, [query.features(k, [1]) for k in (0, 1)])
    want = exact_rows(question, torch.tensor([rows]), exact=run.recompute(train, run.examples(query, [1])))[0]
    for row, path in zip(rows, want.tolist(), strict=True):
        assert found["rows"][str(row)]["sdi"] == pytest.approx(path, rel=1e-4, abs=1e-7)
        assert found["rows"][str(row)]["score"] == pytest.approx(sum(path[1:]), rel=1e-4, abs=1e-7)
    assert found["candidates"] == 12  # all rows: 12 on either side would be asked for
    shown = told.top(1, k=3, first=2, score="sdi")
    assert {str(e["row"]) for side in shown.values() for e in side} == found["rows"].keys()


def test_exact_scores_at_one_checkpoint(told: Explorer) -> None:
    whole, parts = exact(told, 1, k=3), [exact(told, 1, k=12, checkpoint=k) for k in (0, 1)]
    for row, one in whole["rows"].items():
        assert one["score"] == pytest.approx(sum(p["rows"][row]["score"] for p in parts if row in p["rows"]), rel=1e-4)


def test_tokens_of_a_pair(told: Explorer, words: Path) -> None:
    run = StoredRun.open(words)
    [want] = token_features(run, run.store("train"), [4])
    features = [run.store("query").features(k, [2]) for k in (0, 1)]
    sdi = want.influence(features, etas=[c.eta for c in told.train.checkpoints])[0]
    found = tokens(told, 2, 4)
    assert found["tokens"] == list(want.tokens)
    np.testing.assert_array_equal(np.float32(found["sdi"]), sdi)
    parts = [np.array(tokens(told, 2, 4, checkpoint=k)["sdi"]) for k in (0, 1)]
    np.testing.assert_allclose(sum(parts), sdi, rtol=1e-4, atol=1e-7)


def test_all_queries_count_alike_or_by_size(told: Explorer) -> None:
    """The sum over queries is that of their scores; alike, each is divided by the norm of its gradient."""
    scores = np.stack([told.scores(q).sum(1) for q in range(5)])
    by_size = {
        e["row"]: e["score"] for side in ("helpful", "harmful") for e in overall(told, k=12, weights="size")[side]
    }
    for row, score in by_size.items():
        assert score == pytest.approx(scores[:, row].sum(), rel=1e-3, abs=1e-5 * np.abs(scores).max())
    etas = [c.eta for c in told.train.checkpoints]
    gradients = [[told.query.features(k, [q]).values[0].sum(0) * eta for k, eta in enumerate(etas)] for q in range(5)]
    norms = np.array([float(torch.cat(parts).norm()) for parts in gradients])
    alike = {e["row"]: e["score"] for side in ("helpful", "harmful") for e in overall(told, k=12)[side]}
    want = (scores / norms[:, None]).mean(0)
    for row, score in alike.items():
        assert score == pytest.approx(want[row], rel=1e-3, abs=1e-5 * np.abs(want).max())
    assert len(alike) == len(by_size) == 12


def test_of_many_queries_some_stand_for_all(told: Explorer, monkeypatch: pytest.MonkeyPatch, words: Path) -> None:
    monkeypatch.setattr("stepinfluence.app.view.explore.scored.MOST_TOGETHER", 3)
    few = Explorer.open(words)
    assert few.scored.counted == [0, 2, 4]
    found = overall(few, weights="size")
    assert (found["queries"], found["of"]) == (3, 5)
    want = sum(told.scores(q).sum(1) for q in (0, 2, 4))
    first = found["helpful"][0]
    assert first["score"] == pytest.approx(want[first["row"]], rel=1e-3)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_reverse_is_the_same_scores_by_example(words: Path, corrected: bool) -> None:
    def fits(store: object) -> object:
        return ([Fisher.fit(store, checkpoint=k, damping=0.1) for k in (0, 1)], "") if corrected else (None, "")

    explorer = Explorer.open(words, curvatures=fits)  # type: ignore[arg-type]
    for row in (0, 7):
        found = reverse(explorer, row, k=5)
        listed = [*found["helpful"], *found["harmful"]]
        assert sorted(e["row"] for e in listed) == list(range(5))
        most = max(abs(e["score"]) for e in listed)
        for e in listed:
            want = explorer.scores(e["row"])[row]
            assert e["score"] == pytest.approx(float(want.sum()), rel=1e-3, abs=1e-4 * most)
        assert (found["helps"], found["harms"]) == (len(found["helpful"]), len(found["harmful"]))
        one = reverse(explorer, row, k=5, checkpoint=1)
        assert {e["row"]: e["score"] for e in one["helpful"]} == pytest.approx(
            {e["row"]: float(explorer.scores(e["row"], checkpoint=1)[row].sum()) for e in one["helpful"]}, rel=1e-3
        )


def test_agreement_counts_what_leads_by_halves(told: Explorer) -> None:
    found = agreement(told, 1, k=4, first=2)
    shown = told.top(1, k=4, first=2)
    question = replace(ask(told.train, [told.query.features(k, [1]) for k in (0, 1)]), ranked=(1, 2))
    for side in ("helpful", "harmful"):
        rows = [e["row"] for e in shown[side]]
        half = halves(replace(question, harmful=side == "harmful"), len(rows), torch.tensor([rows])).rows
        assert found["sides"][side] == {"rows": len(rows), "halves": [len({*rows} & {*h[0].tolist()}) for h in half]}
    assert found["noise"] > 0


def test_a_page_without_a_server_holds_what_it_shows(told: Explorer) -> None:
    saved = saved_answers(told, queries=2, exactly=True, by_token=True, progress=False)
    query = saved["byQuery"]["1"]
    assert query["exact"] == exact(told, 1)
    one = query["scores"]["sdi"]
    assert one["agreement"] == agreement(told, 1)
    for e in one["examples"]:
        for k in (0, 1):
            np.testing.assert_allclose(e["parts"][k], told.scores(1, checkpoint=k)[e["row"]], rtol=1e-4, atol=1e-7)
    for row, pair in one["pairs"].items():
        assert pair["tokens"] == tokens(told, 1, int(row))
        assert saved["reverse"]["sdi"][row]["helps"] == reverse(told, int(row))["helps"]
    with pytest.raises(ValueError, match=r"tokens: .* --trust-project"):
        saved_answers(Explorer.open(told.train.path.parent, no_model="use --trust-project"), queries=1, by_token=True)


def test_leading_rows_are_those_of_a_full_sort() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(-9, 9, 2000).astype(np.float32)  # many of them equal
    values[::7] = np.nan
    for k in (1, 5, 400):
        known = np.flatnonzero(~np.isnan(values))
        assert leading(values, k) == known[np.argsort(-values[known], kind="stable")[:k]].tolist()
        assert leading(values, k, smallest=True) == known[np.argsort(values[known], kind="stable")[:k]].tolist()
    assert leading(values[:5], 10) == leading(values[:5], 4)
