"""Which examples of a pool should the model be fine-tuned on, for a target? Chosen by all loop steps, or by some.

A model knows the majority of the first 3, 5 or 7 of nine bits. The target is the majority of all 9; the pool has all
four kinds, and wrong labels. Each way of choosing is checked by fine-tuning on what it chose.
"""

from __future__ import annotations

import copy

import stepinfluence
import torch
from _counted_majority import COUNTS, POOL, Task, held_out, make_task, train, untrained
from stepinfluence.evaluation.problems.counting import LoopedClassifier, loss

CHOSEN = 48
FINE_TUNING = {"updates": 30, "rate": 3e-4}
HOW = {"": {}, ", normalised": {"normalize": "train"}, ", corrected": {"curvature": "fisher"}}


def choose(sdi: torch.Tensor) -> torch.Tensor:
    """The best example of each target in turn, then the second best, …: ``(CHOSEN,)`` rows of ``sdi (pool, targets)``.

    The best for all targets together would often be examples of one label.
    """
    places = sdi.argsort(0, descending=True).flatten().tolist()
    return torch.tensor(list(dict.fromkeys(places))[:CHOSEN])


def selections(model: LoopedClassifier, task: Task, seed: int) -> dict[str, torch.Tensor]:
    """Chosen places in the pool, by each way of choosing."""
    capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
    pool = capture.featurize([task.batch(task.pool)], loss, per_step=False, progress=False)
    target = capture.featurize([task.batch(task.target)], loss, progress=False)
    drawn = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))
    found, half = {"random": drawn[:CHOSEN]}, model.steps // 2
    for how, options in HOW.items():
        sdi = stepinfluence.influence(pool, target, **options).sdi  # (pool, targets, steps)
        name = "TracIn" if how == "" else f"all steps{how}"
        found[name] = choose(sdi.sum(2))
        found[f"early steps{how}"] = choose(sdi[..., :half].sum(2))
        found[f"late steps{how}"] = choose(sdi[..., half:].sum(2))
    return found


def measure(seed: int) -> dict[str, dict[str, float]]:
    """By way of choosing: loss and accuracy on new targets, share of the target's kind, share of wrong labels."""
    task = make_task(seed)
    model = train(untrained(seed), task, task.learnt, 60, 3e-3)
    before = held_out(model, task)
    found = {"before": {"loss": before[0], "accuracy": before[1]}}
    for name, places in selections(model, task, seed).items():
        rows = task.pool[places]
        tuned = train(copy.deepcopy(model), task, rows, **FINE_TUNING)
        losses, accuracy = held_out(tuned, task)
        found[name] = {
            "loss": losses,
            "accuracy": accuracy,
            "of the kind": float((task.counts[rows] == COUNTS[-1]).float().mean()),
            "wrong": float(torch.isin(rows, task.wrong).float().mean()),
        }
    return found


def main() -> dict[str, dict[str, float]]:
    found = measure(0)
    print(f"chosen for fine-tuning: {CHOSEN} of {POOL}")
    for name, figures in found.items():
        print(f"{name:<25}" + ", ".join(f"{what} {value:.2f}" for what, value in figures.items()))
    return found


if __name__ == "__main__":
    main()
