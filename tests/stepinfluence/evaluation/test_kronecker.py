"""bench.kronecker: factors are those of plain loops, exact where the Fisher is a product, and what is kept of a run."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stepinfluence import attach
from stepinfluence.attribution.curvature.factors import of_rows
from stepinfluence.evaluation import Problem
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.retraining import Retrainings, training_seed
from stepinfluence.evaluation.trained import Trained
from stepinfluence.evaluation.training import Recipe
from torch import Tensor, nn

from bench.dampings import by_training_time
from bench.kronecker import __main__ as command
from bench.kronecker import factors as kf

STEPS, TOKENS, SIDE, OTHER = 3, 2, 3, 4


class Body(nn.Module):
    """Two maps and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(SIDE, OTHER, bias=False)
        self.back = nn.Linear(OTHER, SIDE, bias=False)
        self.gain = nn.Parameter(1 + 0.3 * torch.randn(SIDE))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.back(torch.tanh(self.wide(x)))  # type: ignore[no-any-return]


class Looped(nn.Module):
    """A body of few numbers, applied three times to two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(STEPS):
            x = self.body(x)
        return x


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum((1, 2))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[tuple[Tensor, Tensor]]:
        x, y = (torch.randn(n, TOKENS, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
        return list(zip(x, y, strict=True))

    def untrained(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Looped().double()

    return Problem(
        name="tiny",
        train=draw(70),  # two batches
        queries=draw(3),
        untrained=untrained,
        loss=_loss,
        body=lambda model: model.body,  # type: ignore[arg-type, return-value]
        collate=lambda examples: tuple(torch.stack([e[k] for e in examples]) for k in (0, 1)),
        training=Recipe(2, 1e-2),
    )


def _by_autograd(model: nn.Module, example: tuple[Tensor, Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """``(delta, a)`` of each map at each use, ``(tokens, .)`` each, in the order of the steps."""
    body: Any = model.body
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {"wide": [], "back": []}
    x = example[0]
    for _ in range(STEPS):
        a = x
        hidden = a @ body.wide.weight.T
        hidden.retain_grad()
        b = torch.tanh(hidden)
        out = b @ body.back.weight.T
        out.retain_grad()
        kept["wide"].append((hidden, a))
        kept["back"].append((out, b))
        x = a + body.gain * out
    (x - example[1]).square().sum().backward()
    return {name: [(z.grad, a.detach()) for z, a in uses] for name, uses in kept.items()}  # type: ignore[misc]


def _sides_by_loops(uses: list[list[tuple[Tensor, Tensor]]], sharing: str) -> tuple[np.ndarray, np.ndarray]:
    """S and A of one weight, from its uses by example and step."""
    s: Any = 0.0
    a: Any = 0.0
    for example in uses:
        one = [[(d.numpy(), x.numpy()) for d, x in zip(*use, strict=True)] for use in example]  # [step][token]
        if sharing == "expand":
            samples = [use for step in one for use in step]
        elif sharing == "reduce steps":
            samples = [
                (sum(one[t][k][0] for t in range(STEPS)), sum(one[t][k][1] for t in range(STEPS)) / STEPS)
                for k in range(TOKENS)
            ]
        else:
            every = [use for step in one for use in step]
            samples = [(sum(d for d, _ in every), sum(x for _, x in every) / len(every))]
        for d, x in samples:
            s, a = s + np.outer(d, d), a + np.outer(x, x) / len(samples)
    return s / len(uses), a / len(uses)


def _recorded(problem: Problem, model: nn.Module) -> tuple[dict[str, kf.Weight], dict[str, kf.Weight]]:
    capture = attach(model, body=problem.body(model), sketch_size=16)
    return kf.record(capture, problem, "train"), kf.record(capture, problem, "query")


def test_factors_and_scores_are_those_of_plain_loops(problem: Problem) -> None:
    model = problem.untrained(0).eval()
    train, query = _recorded(problem, model)
    uses = [_by_autograd(model, example) for example in problem.train]
    assert command.check(problem, model, train) < 1e-12
    for short in ("wide", "back"):
        name = f"body.{short}.weight"
        mine = [example[short] for example in uses]
        g = np.array([sum(d.T.numpy() @ a.numpy() for d, a in example) for example in mine])
        asked = query[name].gradients
        np.testing.assert_allclose(train[name].gradients, g, atol=1e-12 * np.abs(g).max())
        for sharing in kf.SHARINGS:
            if sharing == "gradients":
                s, a = sum(m @ m.T for m in g) / len(g), sum(m.T @ m for m in g) / len(g)
                a = a / np.trace(s)
            else:
                s, a = _sides_by_loops(mine, sharing)
            _holds(train[name], asked, (s, a), g, sharing)


def _holds(weight: kf.Weight, asked: Tensor, sides: tuple[np.ndarray, np.ndarray], g: np.ndarray, sharing: str) -> None:
    """Scores of every form against a dense inverse of ``(R C, R C)``."""
    (s, a), rows = sides, g.reshape(len(g), -1)
    basis = kf.Basis.of(weight, sharing)  # type: ignore[arg-type]
    for form in kf.FORMS:
        fitted = kf.Kronecker.fit({"w": weight}, form, {"w": basis})
        damping = 0.03 * float(fitted.values["w"].max())
        if form == "EK-FAC":
            u, v = np.linalg.eigh(s)[1], np.linalg.eigh(a)[1]
            vectors = np.kron(u, v)
            dense = vectors @ np.diag(((rows @ vectors) ** 2).mean(0)) @ vectors.T + damping * np.eye(rows.shape[1])
        elif form == "K-FAC":
            dense = np.kron(s, a) + damping * np.eye(rows.shape[1])
        else:
            p = np.sqrt((np.trace(a) / len(a)) / (np.trace(s) / len(s)))
            dense = np.kron(s + np.sqrt(damping) / p * np.eye(len(s)), a + np.sqrt(damping) * p * np.eye(len(a)))
        expected = rows @ np.linalg.solve(dense, asked.flatten(1).numpy().T)
        found = kf.products({"w": weight.gradients}, fitted.transform({"w": asked}, {"w": damping}))
        np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max(), err_msg=f"{form}, {sharing}")


def test_where_the_fisher_is_a_product_all_forms_are_the_block_fisher() -> None:
    """Every ``delta`` meets every ``a``, each example one use: the Fisher is ``S (x) A``, with the full eigenbasis."""
    rng = torch.Generator().manual_seed(1)
    deltas, inputs = torch.randn(6, 4, generator=rng).double(), torch.randn(5, 3, generator=rng).double()
    d, a = (torch.stack(x)[:, None, None] for x in zip(*itertools.product(deltas, inputs), strict=True))
    weight = kf.Weight(torch.einsum("ntlr,ntlc->nrc", d, a), d, a)
    query = torch.randn(2, 4, 3, generator=rng).double()
    exact = of_rows(weight.gradients.flatten(1))
    for sharing, form in itertools.product(kf.SHARINGS, kf.FORMS[:2]):
        fitted = kf.Kronecker.fit({"w": weight}, form, {"w": kf.Basis.of(weight, sharing)})
        damping = fitted.relative(1e-2, to="all")["w"]
        assert damping == pytest.approx(1e-2 * exact.largest)
        found = fitted.transform({"w": query}, {"w": damping})["w"].flatten(1)
        expected = exact.solve(query.flatten(1), damping)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
        assert fitted.relative(0.1, to="mean")["w"] == pytest.approx(0.1 * float(exact.values.mean()))


def test_a_vector_has_its_fisher_itself(problem: Problem) -> None:
    train, query = _recorded(problem, problem.untrained(0).eval())
    (name,) = (name for name in train if name.endswith("gain"))
    assert train[name].deltas is None
    exact = of_rows(train[name].gradients.flatten(1))
    for sharing, form in itertools.product(kf.SHARINGS, kf.FORMS[:2]):
        fitted = kf.Kronecker.fit({name: train[name]}, form, {name: kf.Basis.of(train[name], sharing)})
        found = fitted.transform({name: query[name].gradients}, {name: 0.1})[name].flatten(1)
        torch.testing.assert_close(found, exact.solve(query[name].gradients.flatten(1), 0.1))


def test_without_damping_ek_fac_whitens_its_eigenbasis(problem: Problem) -> None:
    """What the correction is for: in the eigenvectors the second moments of the train gradients are the values."""
    train, _ = _recorded(problem, problem.untrained(0).eval())
    bases = {name: kf.Basis.of(one, "expand") for name, one in train.items()}
    corrected, plain = (kf.Kronecker.fit(train, form, bases) for form in kf.FORMS[:2])
    for name, one in train.items():
        trace = one.gradients.square().sum((1, 2)).mean()
        assert float(corrected.values[name].sum()) == pytest.approx(float(trace))
        if one.deltas is not None:
            assert float(plain.values[name].sum()) != pytest.approx(float(trace), rel=1e-2)


def test_recorded_gradients_that_are_not_exact_are_refused(problem: Problem) -> None:
    model = problem.untrained(0).eval()
    train, _ = _recorded(problem, model)
    wrong = {name: replace(one, gradients=one.gradients * (1 + 1e-3)) for name, one in train.items()}
    with pytest.raises(SystemExit, match=r"tiny: recorded gradients are 0.001 of their norm"):
        command.check(problem, model, wrong)


def test_a_run_and_what_is_kept_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(make_problem("majority", n_train=20, n_query=4, steps=2), training=Recipe(3, 3e-3))
    monkeypatch.setattr(command, "make_problem", lambda _: small)
    monkeypatch.setattr(command, "SKETCH_SIZE", 64)
    arguments = ["majority", "--seeds", "2", "--subsets", "3", "--repeats", "1", "--folder", str(tmp_path / "models")]
    monkeypatch.setattr(sys, "argv", ["bench.kronecker", *arguments, "--json", str(tmp_path / "kept.json")])
    threads = torch.get_num_threads()
    try:
        command.main()
    finally:
        torch.set_num_threads(threads)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["settings"] == {"seeds": 2, "subsets": 3, "repeats": 1, "m": 64}
    methods = {command.SKETCHED, command.SKETCHED_BLOCKS, command.EXACT, command.EXACT_BLOCKS, *command.KRONECKER}
    assert {name.split(": ")[0] for name in kept["lds"]} == {command.PLAIN, *methods}
    assert all(len(values) == 2 and np.abs(values).max() <= 1 for values in kept["lds"].values())
    for method in command.KRONECKER:
        assert {f"{method}: {name}" for name in (command.LENGTH, command.MEAN, "1e-03 of all", "1e-03 of a block")} <= (
            kept["lds"].keys()
        )
        assert set(kept["seconds"][method]) == {"pass", "fit", "apply"}
        assert kept["numbers"][method]["a train example"] == 12_704
    assert kept["seconds"].keys() == kept["numbers"].keys()
    # The damping of training's length is the library's, and so is the sketched Fisher under it.
    model = Retrainings(small, tmp_path / "models").model(0)
    trained = Trained(small, model, training_seed(0, 0))
    expected = by_training_time(trained, sketch_size=command.SKETCH_SIZE).scores
    found = command.score(trained).scores[f"{command.SKETCHED}: {command.LENGTH}"].double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
