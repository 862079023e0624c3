"""Answers that come from the model itself, and those about all queries: checked against the library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import Expected, inner_products, multilinear
from stepinfluence import Fisher
from stepinfluence.app.runs.by_token import token_features
from stepinfluence.app.runs.stored import StoredRun
from stepinfluence.app.view.explore import Explorer
from stepinfluence.app.view.explore.agreement import agreement
from stepinfluence.app.view.explore.everything import overall, reverse
from stepinfluence.app.view.explore.model import exact, tokens
from stepinfluence.app.view.explore.page import saved_answers
from stepinfluence.app.view.explore.scored import What, leading
from stepinfluence.search import ask, exact_rows
from stepinfluence.search.noise import halves

pytestmark = pytest.mark.numeric


def test_exact_scores_are_those_of_the_one_exact_path(told: Explorer, words: Path) -> None:
    found = exact(told, 1, k=3, first=2)
    run = StoredRun.open(words)
    train, query = run.store("train"), run.store("query")
    assert found["candidates"] == 12  # all rows: 12 on either side are asked for
    rows = list(range(12))
    question = ask(train, [query.features(k, [1]) for k in (0, 1)])
    want = exact_rows(question, torch.tensor([rows]), exact=run.recompute(train, run.examples(query, [1])))[0]
    for row, one in found["rows"].items():
        path = want[int(row)].tolist()
        assert one["sdi"] == path  # the same batches, the same path
        assert one["score"] == sum(path[1:])
    shown = told.top(1, k=3, first=2, score="sdi")
    assert {str(e["row"]) for side in shown.values() for e in side} == found["rows"].keys()


def test_exact_scores_at_one_checkpoint(told: Explorer) -> None:
    """They add up to those of all: the same numbers, added in another order."""
    whole, parts = exact(told, 1, k=12), [exact(told, 1, k=12, checkpoint=k) for k in (0, 1)]
    for row, one in whole["rows"].items():
        mine = torch.tensor([p["rows"][row]["sdi"] for p in parts], dtype=torch.float64)
        Expected(mine.sum(0), mine.float().sum(0), mine.abs().sum(0)).check(torch.tensor(one["sdi"]))


def test_tokens_of_a_pair(told: Explorer, words: Path) -> None:
    run = StoredRun.open(words)
    [want] = token_features(run, run.store("train"), [4])
    features = [run.store("query").features(k, [2]) for k in (0, 1)]
    sdi = want.influence(features, etas=[c.eta for c in told.train.checkpoints])[0]
    found = tokens(told, 2, 4)
    assert found["tokens"] == list(want.tokens)
    np.testing.assert_array_equal(np.float32(found["sdi"]), sdi)
    parts = torch.tensor([tokens(told, 2, 4, checkpoint=k)["sdi"] for k in (0, 1)], dtype=torch.float64)[:, 1:]
    Expected(parts.sum(0), parts.float().sum(0), parts.abs().sum(0)).check(torch.from_numpy(sdi[1:]))


def features(explorer: Explorer) -> list[torch.Tensor]:
    """By checkpoint the train rows ``(N, D)``, then the queries' rows ``(Q, steps, D)``, times eta."""
    train = [explorer.train.features(k).values.sum(1) for k in (0, 1)]
    return train + [explorer.query.features(k).values * c.eta for k, c in enumerate(explorer.train.checkpoints)]


def together(found: dict[str, Any]) -> torch.Tensor:
    """``(N, steps)`` of the lists of all rows."""
    listed = sorted([*found["helpful"], *found["harmful"]], key=lambda e: e["row"])
    assert [e["row"] for e in listed] == list(range(12))
    return torch.tensor([e["sdi"] for e in listed])


def test_all_queries_count_alike_or_by_size(told: Explorer) -> None:
    """The sum over queries is that of their scores; alike, each is divided by the norm of its gradient."""
    sides = features(told)

    def whole(*v: torch.Tensor) -> torch.Tensor:
        return sum(torch.einsum("nd,qtd->nt", v[k], v[k + 2]) for k in (0, 1))  # type: ignore[return-value]

    multilinear(whole, *sides).check(together(overall(told, k=12, weights="size")))
    norms = torch.cat([part.double().sum(1) for part in sides[2:]], 1).norm(dim=1)[:, None, None]
    alike = [*sides[:2], *(part.double() / norms / 5 for part in sides[2:])]
    rounded = Expected(*(whole(*(f(v) for v in alike)) for f in (torch.Tensor.double, torch.Tensor.float)),
                       whole(*(v.double().abs() for v in alike)))  # fmt: skip
    rounded.check(together(overall(told, k=12)))


def test_of_many_queries_some_stand_for_all(told: Explorer, monkeypatch: pytest.MonkeyPatch, words: Path) -> None:
    monkeypatch.setattr("stepinfluence.app.view.explore.scored.MOST_TOGETHER", 3)
    few = Explorer.open(words)
    assert few.scored.counted == [0, 2, 4]
    found = overall(few, weights="size")
    assert (found["queries"], found["of"]) == (3, 5)
    sides = features(told)
    picked = [*sides[:2], *(part[[0, 2, 4]] for part in sides[2:])]
    multilinear(lambda *v: sum(torch.einsum("nd,qtd->nt", v[k], v[k + 2]) for k in (0, 1)), *picked).check(
        together(overall(few, k=12, weights="size"))
    )


def of_queries(found: dict[str, Any]) -> torch.Tensor:
    """``(Q, steps)`` of the lists of all queries."""
    listed = sorted([*found["helpful"], *found["harmful"]], key=lambda e: e["row"])
    assert [e["row"] for e in listed] == list(range(5))
    assert (found["helps"], found["harms"]) == (len(found["helpful"]), len(found["harmful"]))
    return torch.tensor([e["sdi"] for e in listed])


def test_the_reverse_is_the_same_scores_by_example(told: Explorer) -> None:
    sides = features(told)
    for row in (0, 7):
        mine = [part[row] for part in sides[:2]]
        both = multilinear(lambda *v: sum(torch.einsum("d,qtd->qt", v[k], v[k + 2]) for k in (0, 1)), *mine, *sides[2:])
        both.check(of_queries(reverse(told, row, k=5)))
        one = multilinear(lambda a, b: torch.einsum("d,qtd->qt", a, b), mine[1], sides[3])
        one.check(of_queries(reverse(told, row, k=5, checkpoint=1)))


def test_the_reverse_is_corrected_alike(words: Path) -> None:
    """The train row is multiplied by the inverse instead of the queries. A solve rounds up to 1/damping as much."""
    damping = 0.1
    explorer = Explorer.open(
        words, curvatures=lambda s: ([Fisher.fit(s, checkpoint=k, damping=damping) for k in (0, 1)], "")
    )
    fits, sides = explorer.curvatures(""), features(explorer)
    assert fits is not None
    found = of_queries(reverse(explorer, 7, k=5)).double()
    want = torch.from_numpy(np.stack([explorer.scores(q)[7] for q in range(5)])).double()
    sizes = sum(fits[k].solve(sides[k][7][None]).norm() * sides[k + 2].norm(dim=2) for k in (0, 1))
    allowed = 8 * torch.finfo(torch.float32).eps / damping * sizes
    assert bool(((found - want).abs() <= allowed).all())
    assert bool((allowed < 1e-3 * want.abs().max()).all()), "cannot fail"


def test_agreement_counts_what_leads_by_halves(told: Explorer) -> None:
    found = agreement(told, What(1), k=4, first=2)
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
    assert one["agreement"] == agreement(told, What(1))
    for e in one["examples"]:
        for k in (0, 1):
            sides = [told.train.features(k, [e["row"]]).values[0].sum(0), told.query.features(k, [1]).values[0]]
            want = inner_products("d,td->t", *sides, scale=told.train.checkpoints[k].eta)
            want.check(torch.tensor(e["parts"][k]))
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
