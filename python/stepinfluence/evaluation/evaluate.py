"""``evaluate``: several attribution methods on one problem, against retraining."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm

from stepinfluence.capture import ExactCapture, attach
from stepinfluence.evaluation.methods import Method, Scored, available
from stepinfluence.evaluation.metrics import (
    Estimate,
    bootstrap,
    leave_one_out_correlation,
    linear_datamodeling_score,
    mislabel_auc,
    randomization_check,
    top_k_overlap,
)
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.steps import step_counterfactual
from stepinfluence.scoring import influence

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Merits:
    """Figures of one method; intervals of 95 % by bootstrap over queries (AUC: over training examples).

    Attributes:
        method: its name.
        lds: linear datamodeling score.
        loo: leave-one-out correlation.
        mislabel: AUC of planted errors by self-influence; None where the method has none, or none was planted.
        brittleness: share of right answers that turn wrong when the most helpful tenth is left out of training.
        overlap: with exact TracIn: share of the most helpful tenth in common.
        randomization: rank correlation with the method's scores of untrained weights; 0 is best.
        seconds: processor seconds of scoring.
        bytes_per_example: kept of each training example.
    """

    method: str
    lds: Estimate
    loo: Estimate
    mislabel: Estimate | None
    brittleness: Estimate | None
    overlap: Estimate | None
    randomization: Estimate
    seconds: float
    bytes_per_example: int


@dataclass(frozen=True)
class StepMerits:
    """Figures of the step-resolved scores.

    Attributes:
        conservation: relative difference between the summed step sketches and the sketch of the whole gradient.
        counterfactual: correlation, for each query over training examples and steps, of SDI with the loss change that a
            small training step at one use of the weights alone really makes.
        slope: least-squares slope of the same; 1 where SDI predicts the size, too.
    """

    conservation: float
    counterfactual: Estimate
    slope: float


@dataclass(frozen=True)
class Evaluation:
    """Everything :func:`evaluate` found."""

    problem: str
    merits: tuple[Merits, ...]
    steps: StepMerits
    retrainings: int
    seconds: float
    accuracy: float | None

    def markdown(self) -> str:
        """A table of the methods, and a line on the steps."""
        names = ("method", "LDS", "LOO corr.", "mislabel AUC", "brittleness", "top-10% overlap", "randomisation", "s")
        lines = ["| " + " | ".join((*names, "B/example")) + " |", "|" + "---|" * 9]
        for m in self.merits:
            cells = [m.method, *map(_cell, (m.lds, m.loo, m.mislabel, m.brittleness, m.overlap, m.randomization))]
            lines.append("| " + " | ".join([*cells, f"{m.seconds:.2f}", str(m.bytes_per_example)]) + " |")
        s = self.steps
        by_step = (
            f"By step: conservation error {s.conservation:.1e}; correlation of SDI with what a training step at one "
            f"loop step alone does to the loss: {s.counterfactual}, slope {s.slope:.2f}."
        )
        lines += ["", by_step]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _cell(estimate: Estimate | None) -> str:
    return "–" if estimate is None or np.isnan(estimate.value) else str(estimate)


def evaluate(
    problem: Problem,
    methods: Mapping[str, Method] | None = None,
    *,
    subsets: int = 32,
    left_out: int = 12,
    flips: int = 6,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Compare methods on a problem.

    The model is trained ``1 + subsets + left_out + flips * methods`` times.

    Args:
        problem: what to learn.
        methods: by name; all that this machine can run if not given.
        subsets: models for the LDS, each trained on a random half of the examples.
        left_out: examples that are left out one at a time; half of them those of the largest influence by exact
            TracIn (or the first method), the others at random.
        flips: rightly answered queries for the brittleness; 0 to leave it out.
        seed: of all random draws and of every training run.
        progress: show a progress bar.

    Raises:
        ValueError: fewer than three subsets or two examples left out.
    """
    if subsets < 3 or left_out < 2:
        raise ValueError(f"subsets, left_out: got {subsets} and {left_out}; use at least 3 and 2")
    chosen = dict(available() if methods is None else methods)
    began = time.perf_counter()
    rng = np.random.default_rng(seed)
    n = len(problem.train)
    everyone = np.arange(n)
    model = problem.fit(everyone, seed)
    before = problem.query_losses(model)
    right = np.flatnonzero(problem.query_correct(model)) if problem.correct else np.zeros(0, int)
    asked = rng.permutation(right)[:flips]
    total = subsets + left_out + len(asked) * len(chosen)
    with tqdm(total=total, desc=f"{problem.name}: retraining", unit="model", delay=2, disable=not progress) as bar:

        def retrained(rows: npt.NDArray[np.int64]) -> nn.Module:
            bar.update()
            return problem.fit(rows, seed)

        scored = {name: method(problem, model) for name, method in chosen.items()}
        fresh = problem.untrained(seed + 1)
        fresh.eval()
        halves = np.zeros((subsets, n), dtype=bool)
        for half in halves:
            half[rng.permutation(n)[: n // 2]] = True
        losses = np.stack([problem.query_losses(retrained(np.flatnonzero(half))) for half in halves])
        reference = chosen.get("TracIn, exact")
        exact = scored["TracIn, exact"].scores if reference else next(iter(scored.values())).scores
        removed = _to_leave_out(exact, left_out, rng)
        changes = np.stack([problem.query_losses(retrained(np.delete(everyone, r))) - before for r in removed])
        merits = []
        for name, found in scored.items():
            flipped = [_flips(problem, retrained, found, int(q)) for q in asked]
            again = chosen[name](problem, fresh).scores
            same = (
                top_k_overlap(found.scores, exact, max(1, n // 10)) if reference and name != "TracIn, exact" else None
            )
            spotted = found.suspicion is not None and problem.mislabelled is not None
            merits.append(
                Merits(
                    method=name,
                    lds=bootstrap(linear_datamodeling_score(found.scores, losses, halves), seed=seed),
                    loo=bootstrap(leave_one_out_correlation(found.scores, changes, removed), seed=seed),
                    mislabel=mislabel_auc(found.suspicion, problem.mislabelled, seed=seed)  # type: ignore[arg-type]
                    if spotted
                    else None,
                    brittleness=bootstrap(flipped, seed=seed) if len(asked) else None,
                    overlap=bootstrap(same, seed=seed) if same is not None else None,
                    randomization=bootstrap(randomization_check(found.scores, again), seed=seed),
                    seconds=found.seconds,
                    bytes_per_example=found.bytes_per_example,
                )
            )
    return Evaluation(
        problem=problem.name,
        merits=tuple(merits),
        steps=step_merits(problem, model, seed=seed),
        retrainings=1 + total,
        seconds=time.perf_counter() - began,
        accuracy=len(right) / len(problem.queries) if problem.correct else None,
    )


def step_merits(
    problem: Problem, model: nn.Module, *, examples: int = 8, size: float = 1e-3, seed: int = 0
) -> StepMerits:
    """Are the step-resolved scores what they claim to be? By trying each out (:func:`step_counterfactual`).

    Args:
        problem: its data.
        model: trained.
        examples: training examples whose gradient is tried as a training step.
        size: of the step relative to the norm of the body's weights: small, as influence is of first order.
        seed: of the choice.
    """
    body = problem.body(model)
    capture = attach(model, body=body, sketch_size=2048)
    exact = ExactCapture(model, body=body)
    query_batch = problem.collate(problem.queries)
    query = capture.featurize([query_batch], problem.loss, progress=False)
    whole = capture.featurize([query_batch], problem.loss, per_step=False, progress=False)
    difference = (query.values.sum(1) - whole.values).norm() / whole.values.norm()
    chosen = np.random.default_rng(seed).permutation(len(problem.train))[:examples]
    batch = problem.collate([problem.train[int(r)] for r in chosen])
    sdi = influence(capture.featurize([batch], problem.loss, per_step=False, progress=False), query).sdi.double()
    gradients = exact.featurize([batch], problem.loss, per_step=False, progress=False)
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).norm()
    predicted, found = [], []
    for row in range(len(chosen)):
        gradient = gradients.values[row]
        eta = float(size * weights / gradient.norm().clamp_min(1e-12))
        change = {b.name: (-eta * gradient[b.start : b.stop]).view(b.shape) for b in gradients.space.blocks}
        moved = step_counterfactual(model, body, query_batch, problem.loss, change, steps=query.values.shape[1])
        # Per unit of eta: examples with large and small gradients count alike.
        found.append(-moved.numpy() / eta)
        predicted.append(sdi[row].numpy())
    a, b = np.stack(predicted), np.stack(found)  # (examples, queries, steps)
    by_query = [
        np.corrcoef(a[:, q].ravel(), b[:, q].ravel())[0, 1]
        for q in range(a.shape[1])
        if a[:, q].std() and b[:, q].std()
    ]
    return StepMerits(
        conservation=float(difference),
        counterfactual=bootstrap(by_query, seed=seed),
        slope=float((a * b).sum() / (a * a).sum()),
    )


def _to_leave_out(scores: Array, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Half of them the examples with the largest influence, as most others change nothing that could be measured."""
    order = np.argsort(-np.abs(scores).sum(1), kind="stable")
    first = order[: (count + 1) // 2]
    rest = rng.permutation(order[(count + 1) // 2 :])[: count // 2]
    return np.concatenate([first, rest])


def _flips(problem: Problem, retrained: Any, found: Scored, query: int) -> float:
    n = len(problem.train)
    helpful = np.argsort(-found.scores[:, query], kind="stable")[: max(1, n // 10)]
    model = retrained(np.delete(np.arange(n), helpful))
    return float(not problem.query_correct(model)[query])
