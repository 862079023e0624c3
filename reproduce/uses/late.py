"""Wrong examples that act at late steps only: are they found by influence at late steps?"""

from __future__ import annotations

from typing import Any

import numpy as np
import stepinfluence
import torch
from sklearn.metrics import roc_auc_score
from stepinfluence.attribution.features import Features
from stepinfluence.capture import ExactCapture

from reproduce.arrays import Array, Bools
from reproduce.planted.config import make_task
from reproduce.planted.model import LoopedRewriter
from reproduce.planted.planting import Distinct, Examples, clean, mislabel
from reproduce.planted.tasks.step_task import StepTask
from reproduce.planted.training import every_step_loss, to_model, train
from reproduce.uses.config import Config

LATE, EARLY = "late", "early"


def wrong_from(task: StepTask, examples: Examples, other: Examples, first: int, last: int) -> Examples:
    """Examples whose states after steps ``first..last`` (1-based) are another input's; the others are right."""
    states = task.states(examples.inputs)
    states[:, first : last + 1] = other.states[:, first : last + 1]
    return Examples(examples.inputs, states)


def planted(task: StepTask, config: Config, seed: int) -> tuple[Examples, Examples, list[str]]:
    """Training set, held-out queries, and what each training example is: ``""`` for right ones, ``late``, ``early``.

    Late ones show right states up to the middle of the algorithm and another input's from there on, the answer
    included. Early ones are the reverse: their answer is right.
    """
    draw = Distinct(task, torch.Generator().manual_seed(seed + 2**34))  # no stream of the planted experiment's
    ordinary = clean(task, draw(config.planted.examples))
    middle = task.steps // 2
    parts = [ordinary]
    for first, last in ((middle + 1, task.steps), (1, middle)):
        inputs = draw(config.wrong)
        other = mislabel(task, inputs, draw.generator)
        parts.append(wrong_from(task, clean(task, inputs), other, first, last))
    kinds = [""] * len(ordinary) + [LATE] * config.wrong + [EARLY] * config.wrong
    joined = Examples(torch.cat([p.inputs for p in parts]), torch.cat([p.states for p in parts]))
    return joined, clean(task, draw(config.queries)), kinds


def measure(config: Config, seed: int) -> dict[str, Any]:
    """How well scores tell wrong examples, for one seed.

    Returns:
        ``auc``: for ``late`` and ``early`` against right examples, and ``late against early``, by score: of single
        steps, of late and early steps, of all, and of the loss; ``self``: self-influence, ``queries``: what an example
        does to held-out queries' loss. ``middle``: the last early step. ``accuracy``: share of right states shown.
    """
    task = make_task(config.task, large=config.planted.large)
    examples, queries, kinds = planted(task, config, seed)
    loss, of_seed = every_step_loss(task), config.of_seed(seed)
    model, _ = train(task, examples, of_seed, loss=loss, seed=seed, steps=of_seed.taught_steps)
    sides = [_features(model, part, loss) for part in (examples, queries)]
    own = stepinfluence.self_influence(sides[0]).cpu().numpy()
    harm = -stepinfluence.influence(sides[0].summed(), sides[1]).sdi.mean(1).cpu().numpy()
    kind = np.array(kinds)
    compared = {
        LATE: (kind == LATE, kind == ""),
        EARLY: (kind == EARLY, kind == ""),
        f"{LATE} against {EARLY}": (kind == LATE, kind == EARLY),
    }
    scores = {"loss": {"loss": sides[0].losses.cpu().numpy()}}
    scores |= {name: by_steps(values) for name, values in (("self", own), ("queries", harm))}
    return {
        "auc": {
            name: {of: {score: auc(v, yes, no) for score, v in some.items()} for of, some in scores.items()}
            for name, (yes, no) in compared.items()
        },
        "middle": task.steps // 2,
        "accuracy": _shown(model, task, queries),
    }


def by_steps(values: Array) -> dict[str, Array]:
    """Scores from ``(N, steps)``: of each step, of the early and the late half, of all."""
    middle = values.shape[1] // 2
    steps = {f"step {t + 1}": values[:, t] for t in range(values.shape[1])}
    halves = {"early steps": values[:, :middle].sum(1), "late steps": values[:, middle:].sum(1)}
    return {**steps, **halves, "all steps": values.sum(1)}


def auc(scores: Array, positive: Bools, negative: Bools) -> float:
    """Area under the ROC curve of two groups."""
    both = positive | negative
    return float(roc_auc_score(positive[both], scores[both]))


def _features(model: LoopedRewriter, examples: Examples, loss: Any) -> Features:
    capture = ExactCapture(model, body=model.body)
    return capture.featurize([to_model(b, model) for b in examples.batches(16)], loss, progress=False)


@torch.no_grad()
def _shown(model: LoopedRewriter, task: StepTask, examples: Examples) -> float:
    """Share of the algorithm's states, after every step, that the model shows."""
    place = slice(task.answer_positions.start, task.answer_positions.stop)
    tokens = to_model({"tokens": examples.inputs}, model)["tokens"]
    shown = torch.stack(model.hidden(tokens), 1)[:, :, place]
    right = model.read_out(shown).argmax(-1).cpu() == examples.states[:, 1:, place]
    return float(right.float().mean())
