"""Standard errors hold what the errors of many draws of the tables are, and halves are halves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import pytest
import torch
import zoo
from stepinfluence import BlockFisher, ExactCapture, Fisher, attach, influence
from stepinfluence.search import Question, Recompute, ask, exact_rows, two_stage
from stepinfluence.search.noise import halves, standard_errors, why_no_errors, why_no_halves
from stepinfluence.store import Store
from stepinfluence.store.manifest import SketchSpec
from torch import Tensor

N, Q, DRAWS = 12, 3, 60
ROWS = torch.arange(N).expand(Q, N)


def setting() -> tuple[Any, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A model, the two sides' batches, and their exact influence."""
    torch.manual_seed(0)
    model = zoo.Looped(zoo.LAYERS["mlp"]()).double().eval()
    train, query = (zoo.make_batch(size, seed=seed, dtype=torch.float64) for size, seed in ((N, 1), (Q, 2)))
    exact = ExactCapture(model, body="core")
    left, right = (exact.featurize([b], zoo.squared_error, per_step=s) for b, s in ((train, False), (query, True)))
    return model, train, query, influence(left, right).sdi


def asked(
    model: Any, train: dict[str, Tensor], query: dict[str, Tensor], *, told: bool = True, **options: Any
) -> Question:
    how = {k: options.pop(k) for k in ("seed", "hashing", "layout") if k in options}
    capture = attach(model, body="core", sketch_size=16, **how)
    left, right = (capture.featurize([b], zoo.squared_error, per_step=s) for b, s in ((train, False), (query, True)))
    question = ask(left, right, **options)
    if told:  # as a store tells
        question.train.sketch = SketchSpec.of(capture)  # type: ignore[misc]
    return question


def scores(question: Question, vectors: Tensor | None = None) -> Tensor:
    """``(Q, N)`` of what rows are ranked by."""
    rows = question.train.take(0, range(N))[:, question.columns]
    heads = (question.vectors[0] if vectors is None else vectors)[:, list(question.ranked)].sum(1)
    return heads @ rows.T


@pytest.mark.parametrize("hashing", ["balanced", "iid", "block"])
@pytest.mark.parametrize("layout", ["concat", "sum"])
def test_errors_of_many_draws_are_within_the_standard_error(hashing: str, layout: str) -> None:
    model, train, query, exact = setting()
    errors, bounds, steps = [], [], []
    for seed in range(DRAWS):
        question = asked(model, train, query, seed=seed, hashing=hashing, layout=layout, steps=slice(1, 3))
        whole, by_step = standard_errors(question, ROWS)
        errors.append(scores(question) - exact[:, :, 1:3].sum(2).T)
        bounds.append(whole)
        steps.append(by_step)
    found = torch.stack(errors).square().mean(0).sqrt()
    limit = torch.stack(bounds).double().square().mean(0).sqrt()
    # A standard deviation of 60 draws is off by a tenth, those of heavy-tailed products by more: a half at most here.
    assert bool((found <= 1.5 * limit).all())
    ratio = float((found / limit).mean())
    assert 0.2 < ratio < 1, f"the bound is {1 / ratio:.1f} times what the errors are"
    assert torch.stack(steps).shape == (DRAWS, Q, N, question.steps)


def test_the_error_of_one_parameter_is_its_own_and_variances_add_up() -> None:
    model, train, query, _ = setting()
    names = [block.name for block in asked(model, train, query).train.spaces[0].blocks]
    parts = [standard_errors(asked(model, train, query, parameters=name), ROWS)[0].double() for name in names]
    whole = standard_errors(asked(model, train, query), ROWS)[0].double()
    torch.testing.assert_close(sum(part.square() for part in parts), whole.square(), rtol=1e-5, atol=0)
    biases = [part for name, part in zip(names, parts, strict=True) if name.endswith("bias")]
    assert not any(bool(part.any()) for part in biases)  # short vectors are lossless


def test_missing_rows_have_none_and_checkpoints_without_weight_do_not_count(tmp_path: Path) -> None:
    train = [made.features(made.normal(9, made.WIDTH, seed=s), weights=f"w{s}") for s in (0, 1)]
    query = [made.features(made.normal(2, 3, made.WIDTH, seed=s + 5), weights=f"w{s}", prefix="q") for s in (0, 1)]
    sizes = {block.name: block.stop - block.start for block in made.BLOCKS}
    store = made.store(tmp_path / "s", train, etas=(0.5, 2.0), sketch=SketchSpec(sizes, "balanced", 0))
    rows = torch.tensor([[3, -1], [0, 8]])
    both = standard_errors(ask(store, query), rows)[0]
    one, two = (standard_errors(ask(store, query, etas=etas), rows)[0] for etas in ((0.5, 0.0), (0.0, 2.0)))
    torch.testing.assert_close(both, one + two, equal_nan=True)
    assert both.isnan().tolist() == [[False, True], [False, False]]


def test_halves_are_unbiased_sketches_of_half_the_size() -> None:
    """Averaged they are the whole; their top rows are those of scores by folded columns."""
    model, train, query, _ = setting()
    question = asked(model, train, query)
    blocks = question.train.spaces[0].blocks

    def half(values: Tensor, sign: int) -> Tensor:
        parts = []
        for block in blocks:
            mine, middle = values[..., block.start : block.stop], (block.stop - block.start) // 2
            lossless = len(block.shape) == 1
            parts.append(mine if lossless else mine[..., :middle] + sign * mine[..., middle:])
        return torch.cat(parts, -1)

    rows, heads = question.train.take(0, range(N)), question.vectors[0].sum(1)
    each = [half(heads, sign) @ half(rows, sign).T for sign in (1, -1)]
    torch.testing.assert_close((each[0] + each[1]) / 2, scores(question))
    found = halves(question, 4, ROWS)
    for some, want in zip(found.rows, each, strict=True):
        assert some.tolist() == want.topk(4).indices.tolist()
    torch.testing.assert_close(found.noise.double(), ((each[0] - each[1]) / 2).square().mean(1).sqrt())
    harmful = halves(replace(question, harmful=True), 4, ROWS)
    assert harmful.rows[0].tolist() == each[0].topk(4, largest=False).indices.tolist()


@pytest.mark.parametrize("kind", [Fisher, BlockFisher])
def test_halves_under_a_curvature_fit_it_again(kind: Any) -> None:
    model, train, query, _ = setting()
    question = asked(model, train, query)
    left = replace(attach(model, body="core", sketch_size=16).featurize([train], zoo.squared_error, per_step=False))
    fitted = kind.fit(left, damping=0.1)
    found = halves(question, 4, ROWS, curvature=[fitted])
    assert found.rows.shape == (2, Q, 4)
    assert bool((found.noise > 0).all())
    # With a damping far above all eigenvalues, nothing is left of the curvature but a factor.
    flat = halves(question, 4, ROWS, curvature=[kind.fit(left, damping=1e6)]) if kind is Fisher else None
    if flat is not None:
        assert flat.rows.tolist() == halves(question, 4, ROWS).rows.tolist()


def test_what_has_no_errors_says_why(tmp_path: Path) -> None:
    model, train, query, _ = setting()
    plain = asked(model, train, query, told=False)
    assert "do not tell how they were sketched" in why_no_errors(plain.train, corrected=False)
    with pytest.raises(ValueError, match="question: no standard errors: features in memory"):
        standard_errors(plain, ROWS)
    with pytest.raises(ValueError, match="question: no halves: features in memory"):
        halves(plain, 3, ROWS)
    told = asked(model, train, query)
    assert why_no_errors(told.train, corrected=True).startswith("scores that are corrected for curvature")
    assert why_no_errors(told.train, corrected=False) == why_no_halves(told.train, corrected=True) == ""


def test_exact_rows_are_those_of_two_stages() -> None:
    model, train, query, exact = setting()
    capture = attach(model, body="core", sketch_size=16)

    class Examples:
        def __init__(self, batch: dict[str, Tensor]) -> None:
            self.batch = batch

        def __len__(self) -> int:
            return len(self.batch["x"])

        def __getitem__(self, index: int, /) -> dict[str, Tensor]:
            return {name: t[index] for name, t in self.batch.items()}

    sides = [capture.featurize([b], zoo.squared_error, per_step=s) for b, s in ((train, False), (query, True))]
    recompute = Recompute(capture, zoo.squared_error, Examples(train), Examples(query))
    question = ask(*sides)
    rows = torch.tensor([[1, 4, 7], [0, 2, -1], [3, 5, 11]])
    found = exact_rows(question, rows, exact=recompute, progress=False)
    for q, mine in enumerate(rows.tolist()):
        for slot, row in enumerate(mine):
            want = exact[row, q] if row >= 0 else torch.zeros(exact.shape[2], dtype=torch.float64)
            torch.testing.assert_close(found[q, slot].double(), want, rtol=1e-5, atol=1e-6)
    top = two_stage(question, 2, exact=recompute, candidates=N, progress=False).top
    assert top.rows.tolist() == exact.sum(2).T.topk(2).indices.tolist()


def test_a_store_tells_how_it_was_sketched(tmp_path: Path) -> None:
    sizes = {block.name: block.stop - block.start for block in made.BLOCKS}
    spec = SketchSpec(sizes, "iid", 3)
    store: Store = made.store(tmp_path / "s", [made.features(made.normal(9, made.WIDTH))], sketch=spec)
    query = made.features(made.normal(2, 3, made.WIDTH, seed=1), prefix="q")
    assert ask(store, query).train.sketch == spec
