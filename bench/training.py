"""What influence over all of a training costs, and what is lost where queries are featurized every k updates only.

    python -m bench.training
    python -m bench.training --keep    # kept: docs/training.md states its figures

Errors: two small problems of ``stepinfluence.evaluation``, trained by minibatches from the start; scores of queries
that are up to k - 1 updates old are held against those at every update. Training is the same in all runs of a seed.
Cost: processor seconds of one thread over those of a plain training; of these tiny models (mostly Python's), and of
models of bench.capture, where an update and a refresh of the queries are timed in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import stepinfluence
import torch
from scipy import stats
from stepinfluence import Influence, TrainingInfluence
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.problems.counting import LoopedClassifier, loss
from torch import Tensor, nn

from bench import capture
from bench.provenance import Provenance, add_output, machine_line, write

EVERY = (1, 4, 16, 64)
SKETCH_SIZE, QUERIES, TOP = 512, 8, 10


@dataclass(frozen=True)
class Case:
    """A problem and how it is trained."""

    problem: str
    optimizer: str
    learning_rate: float
    updates: int = 192
    batch: int = 32
    d_model: int = 32
    steps: int = 4

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        kinds = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
        return kinds[self.optimizer](model.parameters(), lr=self.learning_rate)


CASES = {
    "adder": Case("adder", "Adam", 1e-4),
    "majority": Case("majority", "SGD", 0.002),
}
LARGER = ("sudoku", "gpt512")


@dataclass(frozen=True)
class Trained:
    """One training.

    Attributes:
        seconds: of the processor.
        influence: None for a plain training.
        predicted: ``(Q,)``: how far the queries' losses fall, to first order.
        fall: ``(Q,)``: how far they fell.
    """

    seconds: float
    influence: Influence | None
    predicted: Tensor | None
    fall: Tensor


def train(case: Case, seed: int, every: int | None) -> Trained:
    """A training with queries every so many updates; a plain one for None."""
    problem = make_problem(case.problem, n_query=QUERIES, seed=seed)
    tokens, labels = problem.collate(problem.train)
    query = problem.collate(problem.queries)
    torch.manual_seed(seed)
    model = LoopedClassifier(
        int(tokens.max()) + 1, tokens.shape[1], int(labels.max()) + 1, d=case.d_model, steps=case.steps
    )
    optimizer = case.optimizer_of(model)
    order = torch.cat([torch.randperm(len(tokens)) for _ in range(case.updates * case.batch // len(tokens) + 1)])
    batches = order.split(case.batch)[: case.updates]
    before = loss(model, query).detach()
    if every is None:
        start = time.process_time()
        for rows in batches:
            optimizer.zero_grad()
            loss(model, (tokens[rows], labels[rows])).mean().backward()
            optimizer.step()
        return Trained(time.process_time() - start, None, None, before - loss(model, query).detach())
    attached = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE)
    start = time.process_time()
    with TrainingInfluence(attached, optimizer, [query], loss, refresh_every=every) as influence:
        for rows in batches:
            optimizer.zero_grad()
            batch = tokens[rows], labels[rows]
            with influence.batch(batch, ids=rows) as inline:
                inline.losses(loss(model, batch)).mean().backward()
            optimizer.step()
    took = time.process_time() - start
    fall = before - loss(model, query).detach()
    return Trained(took, influence.result(), influence.updates().drops.sum(0), fall)


def errors(found: Influence, exact: Influence) -> dict[str, float]:
    """Of scores against others: relative Frobenius errors, and what becomes of rankings, means over queries."""
    if found.train_ids != exact.train_ids:
        raise SystemExit("two trainings of one seed saw different examples; nothing can be compared")
    ours, true = found.tracin.numpy(), exact.tracin.numpy()
    tops = [np.argsort(-scores, axis=0)[:TOP] for scores in (ours, true)]
    shared = [len(set(a) & set(b)) / TOP for a, b in zip(tops[0].T, tops[1].T, strict=True)]
    return {
        "tracin": float(np.linalg.norm(ours - true) / np.linalg.norm(true)),
        "sdi": float((found.sdi - exact.sdi).norm() / exact.sdi.norm()),
        "rank": statistics.fmean(float(stats.spearmanr(a, b)[0]) for a, b in zip(ours.T, true.T, strict=True)),
        "top": statistics.fmean(shared),
    }


def measure(case: Case, seeds: int) -> dict[str, Any]:
    """Costs and errors of every k, over seeds.

    Raises:
        SystemExit: trainings of one seed differ.
    """
    rows: dict[str, list[dict[str, Any]]] = {str(k): [] for k in EVERY}
    shares = []
    train(case, 0, 1)  # what is done once: tables, kernels, allocations
    for seed in range(seeds):
        plain = train(case, seed, None)
        runs = {k: train(case, seed, k) for k in (EVERY if seed % 2 else EVERY[::-1])}
        exact = runs[1]
        assert exact.influence is not None
        assert exact.predicted is not None
        for k in EVERY:
            run = runs[k]
            assert run.influence is not None
            if not float((run.fall - plain.fall).norm()) <= 1e-2 * float(plain.fall.norm()):
                raise SystemExit(f"{case.problem}, seed {seed}: training with influence is not what it is without")
            rows[str(k)].append({"cost": run.seconds / plain.seconds, **errors(run.influence, exact.influence)})
        shares.append(float(exact.predicted.sum() / exact.fall.sum()))
    return {"case": asdict(case), "every": rows, "predicted share of the fall": shares}


def cost(case: capture.Case, rounds: int) -> dict[str, Any]:
    """Processor seconds of a plain update, of a scored one, and of a refresh of the queries; medians."""
    model, batch = capture.make(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    attached = stepinfluence.attach(model, body=model.core, sketch_size=capture.SKETCH_SIZE)
    query, size = batch[:QUERIES], len(batch)
    took: dict[str, list[float]] = {"plain": [], "scored": [], "refresh": []}

    def plain() -> None:
        capture.loss_fn(model, batch).mean().backward()

    def timed(forward_and_backward: Callable[[], None]) -> float:
        optimizer.zero_grad()
        start = time.process_time()
        forward_and_backward()
        optimizer.step()
        return time.process_time() - start

    with TrainingInfluence(attached, optimizer, [query], capture.loss_fn, refresh_every=2) as influence:

        def scored() -> None:
            with influence.batch(batch, ids=range(size)) as inline:
                inline.losses(capture.loss_fn(model, batch)).mean().backward()

        timed(scored), timed(scored)  # the first ones verify
        for _ in range(rounds):
            with_refresh, without = timed(scored), timed(scored)
            took["refresh"].append(with_refresh - without)
            took["scored"].append(without)
    took["plain"] = [timed(plain) for _ in range(rounds)]
    seconds = {name: statistics.median(values) for name, values in took.items()}
    ratios = {str(k): (seconds["scored"] + seconds["refresh"] / k) / seconds["plain"] for k in EVERY}
    return {"d_model": case.d_model, "steps": case.steps, "batch": size, "seconds": seconds, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    add_output(parser, "training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    provenance, found, larger = Provenance(), {}, {}
    figures = {"seeds": options.seeds, "rounds": options.rounds, "queries": QUERIES, "cases": found, "larger": larger}
    for key in LARGER:
        larger[key] = cost(capture.CASES[key], options.rounds)
        print(f"{key}: {larger[key]['seconds']}, {larger[key]['ratio']}", flush=True)
        write(options.json, provenance, figures)
    for name in options.cases:
        found[name] = measure(CASES[name], options.seeds)
        for k, runs in found[name]["every"].items():
            means = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
            print(f"{name}, k = {k}: {', '.join(f'{key} {value:.3f}' for key, value in means.items())}", flush=True)
        print(f"{name}: predicted share of the fall {found[name]['predicted share of the fall']}", flush=True)
        write(options.json, provenance, figures)
    print(machine_line(provenance.finish()))


if __name__ == "__main__":
    main()
