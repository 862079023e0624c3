"""Do steps mean something after retraining? Leave out the examples that helped one loop step most; look at each step.

    python -m bench.steps_removed majority --keep

For each query and loop step, the tenth of the training examples that is most helpful *at that step* is left out, and
the model is trained again from the same initialisation. What that does to a step is measured in two ways:

- ``use``: the loss of the first model with the new weights of its body at that use only, minus its loss without;
- ``lens``: the loss read off the state after that step (the logit lens), new model minus first.

If steps mean something, a step suffers more from leaving out what helped *it* than from leaving out what helped others.
The figure is that difference in units of the step's mean absolute change, so that all steps count alike; its
p-value is from permuting, in each seed, which set belongs to which step. Every trained model's figures are a line in
``--folder``: a stopped run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from stepinfluence import attach, influence
from stepinfluence.evaluation import logit_lens, over_seeds, step_counterfactual
from stepinfluence.evaluation.metagradient import metagradients
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.retraining import draws, training_seed
from stepinfluence.evaluation.training import Training
from torch import nn

from bench.of_problem import begun, parser_of
from bench.provenance import write

Array = npt.NDArray[np.float64]
MEASURES = ("use", "lens")
PROBLEMS = ("adder", "majority", "language")
PERMUTATIONS = 10_000
SHARE = 10
"""One in so many examples is left out."""


def by_fisher(problem: Problem, training: Training, model: nn.Module, asked: Sequence[int]) -> Array:
    """``(n_train, n_asked, steps)``: SDI of the trained model, corrected for curvature, from sketches."""
    capture = attach(model, body=problem.body(model), sketch_size=2048)
    train = problem.features(capture, "train")
    batch = problem.collate([problem.queries[q] for q in asked])
    query = capture.featurize([batch], problem.loss, progress=False)
    return influence(train, query, curvature="fisher").sdi.double().numpy()


def by_metagradient(problem: Problem, training: Training, model: nn.Module, asked: Sequence[int]) -> Array:
    """The same shape: exact metagradients."""
    return metagradients(training, asked).by_step.double().numpy()


CHOOSERS: dict[str, Callable[[Problem, Training, nn.Module, Sequence[int]], Array]] = {
    "fisher": by_fisher,
    "metagradient": by_metagradient,
}


def changes(problem: Problem, model: nn.Module, other: nn.Module, query: int, steps: int) -> dict[str, list[float]]:
    """What another model does to each step of a query, by each of :data:`MEASURES`, and to its loss."""
    batch, body = problem.collate([problem.queries[query]]), problem.body(model)
    new = dict(other.named_parameters())
    change = {name: new[name].detach() - p.detach() for name, p in model.named_parameters()}
    use = step_counterfactual(model, body, batch, problem.loss, change, steps=steps)
    lens = [logit_lens(m, problem.body(m), batch, problem.loss) for m in (model, other)]
    return {"use": use[0].tolist(), "lens": (lens[1] - lens[0])[0].tolist()}


def run(problem: Problem, seeds: int, queries: int, by: str, folder: Path) -> list[dict[str, Any]]:
    """A record for each seed, query and step; those of the folder are kept.

    Raises:
        ValueError: the folder is of another training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"removed-{by}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = {(r["seed"], r["query"], r["step"]): r for r in map(json.loads, lines)}
    if any(r["training"] != repr(problem.training) for r in kept.values()):
        raise ValueError(f"folder: {folder} is of another training of {problem.name}; give another folder")
    wanted = []
    for seed in range(seeds):
        asked = draws(problem, seed, subsets=3, left_out=2).queries[:queries].tolist()
        steps = len(next(iter(kept.values()))["use"]) if kept else 0
        keys = [(seed, query, step) for query in asked for step in range(steps)]
        if not steps or not all(key in kept for key in keys):
            for record in seeds_records(problem, seed, asked, by, set(kept)):
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                kept[record["seed"], record["query"], record["step"]] = record
                print(f"seed {seed}, query {record['query']}, step {record['step'] + 1}", flush=True)
        wanted += [r for (s, q, _), r in kept.items() if s == seed and q in asked]
    return wanted


def seeds_records(
    problem: Problem, seed: int, asked: Sequence[int], by: str, known: set[tuple[int, int, int]]
) -> Iterator[dict[str, Any]]:
    """The records of a seed that are not known."""
    training = Training(problem, training_seed(seed, 0))
    model = training.model_at(training.final())
    scores = CHOOSERS[by](problem, training, model, asked)
    everyone = np.arange(len(problem.train))
    for column, query in enumerate(asked):
        for step in range(scores.shape[2]):
            if (seed, query, step) in known:
                continue
            helpful = np.argsort(-scores[:, column, step], kind="stable")[: len(everyone) // SHARE]
            other = problem.retrain(np.delete(everyone, helpful), training_seed(seed, 0))
            yield {
                "seed": seed,
                "query": query,
                "step": step,
                "training": repr(problem.training),
                "rows": sorted(helpful.tolist()),
                **changes(problem, model, other, query, scores.shape[2]),
            }


def by_seed(records: Sequence[dict[str, Any]], measure: str) -> Array:
    """``(seeds, queries, sets, steps)``: the change at each step when each set is left out."""
    seeds = sorted({r["seed"] for r in records})
    steps = 1 + max(r["step"] for r in records)
    found = []
    for seed in seeds:
        of_seed = [r for r in records if r["seed"] == seed]
        queries = sorted({r["query"] for r in of_seed})
        table = {(r["query"], r["step"]): r[measure] for r in of_seed}
        found.append([[table[q, t] for t in range(steps)] for q in queries])
    return np.array(found)


def specificity(effects: Array) -> Array:
    """``(seeds,)``: how much more a step changes by its own set than by the others', in units of its mean absolute
    change, averaged over steps and queries."""
    size = np.abs(effects).mean(2, keepdims=True)
    scaled = effects / np.where(size > 0, size, 1)
    steps = effects.shape[3]
    own = np.einsum("sqtt->sqt", scaled)
    others = (scaled.sum(2) - own) / (steps - 1)
    found: Array = (own - others).mean((1, 2))
    return found


def permutation_p(effects: Array, *, draws: int = PERMUTATIONS, seed: int = 0) -> float:
    """Share of relabellings, in each seed of sets by steps, whose mean specificity is at least as large."""
    rng = np.random.default_rng(seed)
    found, count = specificity(effects).mean(), 0
    for _ in range(draws):
        order = np.stack([rng.permutation(effects.shape[2]) for _ in effects])
        shuffled = np.take_along_axis(effects, order[:, None, :, None], axis=2)
        count += specificity(shuffled).mean() >= found - 1e-12
    return (1 + count) / (1 + draws)


def overlap(records: Sequence[dict[str, Any]]) -> float:
    """Mean share of examples that the sets of two steps of a query have in common."""
    sets: dict[tuple[int, int], list[set[int]]] = {}
    for r in records:
        sets.setdefault((r["seed"], r["query"]), []).append(set(r["rows"]))
    pairs = [len(a & b) / len(a) for of in sets.values() for k, a in enumerate(of) for b in of[k + 1 :]]
    return float(np.mean(pairs))


def main() -> None:
    parser = parser_of(__doc__, PROBLEMS, folder="steps-removed")
    parser.add_argument("--by", choices=CHOOSERS, default="fisher", help="scores that choose what is left out")
    parser.add_argument("--queries", type=int, default=4, help="of a seed")
    options, provenance = begun(
        parser,
        lambda known: f"steps-removed-{known.problem}{'' if known.by == 'fisher' else f'-{known.by}'}",
        "steps-removed",
    )
    problem = make_problem(options.problem)
    records = run(problem, options.seeds, options.queries, options.by, options.folder)
    for measure in MEASURES:
        effects = by_seed(records, measure)
        print(f"{measure}: {over_seeds(specificity(effects))}, p = {permutation_p(effects):.4f}")
    print(f"sets in common: {overlap(records):.2f}")
    write(options.json, provenance, {"by": options.by, "records": records})


if __name__ == "__main__":
    main()
