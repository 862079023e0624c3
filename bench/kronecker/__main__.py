"""LDS and cost of K-FAC and EK-FAC, with weight sharing treated in four ways, beside the sketched Fisher.

    python -m bench.kronecker adder --keep

Models, halves and seeds are those of ``python -m bench.dampings``, whose ``--folder`` can be given. All methods score
the same models. Kronecker factors are of exact gradients; so are two matrices beside them, the Fisher of all parameters
and its block of each parameter, which say what the factors lose. A damping is given to all alike: a grid relative to
the largest eigenvalue, of all blocks or of each; a tenth of each block's mean; and one over the length of training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stepinfluence import attach
from stepinfluence.attribution.curvature import BlockFisher, Curvature, Fisher
from stepinfluence.attribution.curvature.factors import Factor, of_rows
from stepinfluence.capture import ExactCapture
from stepinfluence.evaluation import linear_datamodeling_score
from stepinfluence.evaluation.along_training import mean_metric
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.retraining import Retrainings, draws, training_seed
from stepinfluence.evaluation.trained import Trained
from torch import Tensor, nn

from bench import dampings as sketched
from bench.dampings import time_by_all_updates
from bench.kronecker.factors import FORMS, SHARINGS, Basis, Kronecker, Weight, gradients_of, products, record
from bench.of_problem import begun, parser_of
from bench.provenance import write

SUBSETS = {"adder": 8, "majority": 12, "language": 12, "trm": 10}
"""Problems, with the halves of a seed that ``bench.dampings`` was kept with."""

GRID = (*sketched.GRID, 1e-6, 1e-7)
"""Dampings relative to the largest eigenvalue; further down than for sketches, as Kronecker factors want less."""

SKETCH_SIZE = 2048
HEURISTIC = 0.1
"""Of the mean eigenvalue of a block: kronfluence's damping."""

LENGTH, MEAN = "training time", f"{HEURISTIC} of the mean"
PLAIN, SKETCHED, SKETCHED_BLOCKS = "SDI", "Fisher, sketched", "blocks, sketched"
EXACT, EXACT_BLOCKS = "Fisher, exact", "blocks, exact"
KRONECKER = tuple(f"{form}, {sharing}" for form in FORMS for sharing in SHARINGS)

ALLOWED = 1e-4
"""Of its norm: how far a gradient that is recorded may be from that of the exact capture, both in float32."""


@dataclass
class Found:
    """Of one model.

    Attributes:
        scores: ``(n_train, n_query)`` by ``METHOD: DAMPING``.
        seconds: processor seconds of each method, by part: of the pass over the examples, of the fit, of one query side
            transformed and multiplied.
        numbers: that each method's curvature keeps; and, under ``"a train example"``, what is kept of one.
    """

    scores: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextmanager
    def timing(self, method: str, part: str) -> Iterator[None]:
        """Add what runs within to a part."""
        began = time.process_time()
        yield
        parts = self.seconds.setdefault(method, {})
        parts[part] = parts.get(part, 0.0) + time.process_time() - began


def score(trained: Trained) -> Found:
    """Scores of every method with every damping.

    Raises:
        SystemExit: gradients are not those of the exact capture.
    """
    found, problem, model = Found(), trained.problem, trained.model
    capture = attach(model, body=problem.body(model), sketch_size=SKETCH_SIZE)
    metric = mean_metric(trained)
    length = 1 / time_by_all_updates(trained, metric, [target.name for target in capture.targets])
    _sketched(found, trained, length)
    with found.timing("recorded", "pass"):
        train, query = (record(capture, problem, side) for side in ("train", "query"))
    check(problem, model, train)
    asked = gradients_of(query)
    _exact(found, train, asked, length)
    for sharing in SHARINGS:
        with found.timing(sharing, "fit"):
            bases = {name: Basis.of(one, sharing) for name, one in train.items()}
        for form in FORMS:
            method = f"{form}, {sharing}"
            with found.timing(method, "fit"):
                fitted = Kronecker.fit(train, form, bases)
            found.seconds[method]["fit"] += found.seconds[sharing]["fit"]
            _kronecker(found, method, fitted, gradients_of(train), asked, length)
    for method in (EXACT, EXACT_BLOCKS, *KRONECKER):
        found.seconds[method]["pass"] = found.seconds["recorded"]["pass"]
    for part in ("recorded", *SHARINGS):
        del found.seconds[part]
    return found


def _sketched(found: Found, trained: Trained, length: float) -> None:
    """SDI, and its corrections by sketched matrices."""
    problem, model = trained.problem, trained.model
    with found.timing(PLAIN, "pass"):
        capture = attach(model, body=problem.body(model), sketch_size=SKETCH_SIZE)
        train, query = problem.features(capture, "train"), problem.features(capture, "query")
    with found.timing(PLAIN, "apply"):
        found.scores[PLAIN] = train.values @ query.values.T
    width = train.values.shape[1]
    found.numbers[PLAIN] = {"curvature": 0, "a train example": width}
    for method, kind in ((SKETCHED, Fisher), (SKETCHED_BLOCKS, BlockFisher)):
        fitted: Curvature = kind.fit(train)
        largest = max(factor.largest for factor in fitted.factors)
        dampings = {"auto": fitted}
        if kind is Fisher:
            dampings[LENGTH] = fitted.with_damping(length / largest)
        one = "all" if kind is Fisher else "a block"
        dampings.update({f"{damping:.0e} of {one}": fitted.with_damping(damping) for damping in GRID})
        for name, curvature in dampings.items():
            found.scores[f"{method}: {name}"] = train.values @ curvature.transform(query).values.T
        for name, damping in {"auto": "auto", LENGTH: 1.0}.items():
            row = f"{method}: {name}"
            if row in found.scores:
                found.seconds[row] = {"pass": found.seconds[PLAIN]["pass"]}
                with found.timing(row, "fit"):
                    again = kind.fit(train, damping=damping)  # type: ignore[arg-type]
                with found.timing(row, "apply"):
                    _ = train.values @ again.transform(query).values.T
                kept = sum(factor.basis.numel() + len(factor.values) for factor in again.factors)
                found.numbers[row] = {"curvature": kept, "a train example": width}


def _exact(found: Found, train: Mapping[str, Weight], query: Mapping[str, Tensor], length: float) -> None:
    """The Fisher of exact gradients: of all parameters, and the block of each."""
    ours = [train[name].gradients.flatten(1) for name in train]
    theirs = [query[name].flatten(1) for name in train]
    whole = [torch.cat(ours, 1)], [torch.cat(theirs, 1)]
    for method, (rows, asked) in ((EXACT, whole), (EXACT_BLOCKS, (ours, theirs))):
        with found.timing(method, "fit"):
            factors = [of_rows(part) for part in rows]
        dampings = _dampings_of(factors, length)
        for name, each in dampings.items():
            found.scores[f"{method}: {name}"] = _solved(factors, rows, asked, each)
        with found.timing(method, "apply"):
            _solved(factors, rows, asked, dampings[LENGTH])
        kept = sum(factor.basis.numel() + len(factor.values) for factor in factors)
        found.numbers[method] = {"curvature": kept, "a train example": sum(part.shape[1] for part in rows)}


def _solved(
    factors: Sequence[Factor], train: Sequence[Tensor], query: Sequence[Tensor], dampings: Sequence[float]
) -> Tensor:
    """``(n_train, n_query)``: of all blocks together. A block without a factor has train gradients of zero."""
    parts = [
        g @ (f.solve(q, damping) if f.largest else q).T
        for f, g, q, damping in zip(factors, train, query, dampings, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _dampings_of(factors: Sequence[Factor], length: float) -> dict[str, list[float]]:
    """Of each of some matrices; their mean eigenvalues are over all directions that a row has a part in."""
    own = [factor.largest for factor in factors]
    found = {f"{d:.0e} of all": [d * max(own)] * len(own) for d in GRID}
    if len(own) > 1:
        found.update({f"{d:.0e} of a block": [d * each for each in own] for d in GRID})
    means = [float(f.values.sum()) / f.basis.shape[1] for f in factors]
    return {**found, MEAN: [HEURISTIC * mean for mean in means], LENGTH: [length] * len(own)}


def _kronecker(
    found: Found,
    method: str,
    fitted: Kronecker,
    train: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    length: float,
) -> None:
    """One approximation with every damping."""
    dampings = {f"{d:.0e} of all": fitted.relative(d, to="all") for d in GRID}
    dampings.update({f"{d:.0e} of a block": fitted.relative(d, to="block") for d in GRID})
    dampings.update({MEAN: fitted.relative(HEURISTIC, to="mean"), LENGTH: dict.fromkeys(train, length)})
    for name, damping in dampings.items():
        found.scores[f"{method}: {name}"] = products(train, fitted.transform(query, damping))
    with found.timing(method, "apply"):
        products(train, fitted.transform(query, dampings[LENGTH]))
    each = sum(one[0].numel() for one in train.values())
    found.numbers[method] = {"curvature": fitted.numbers, "a train example": each}


def check(problem: Problem, model: nn.Module, train: Mapping[str, Weight], *, count: int = 8) -> float:
    """The largest distance of an example's recorded gradient from that of the exact capture, of its norm.

    Raises:
        SystemExit: beyond :data:`ALLOWED`.
    """
    exact = ExactCapture(model, body=problem.body(model)).featurize(
        [problem.collate(problem.train[:count])], problem.loss, per_step=False, progress=False
    )
    worst = 0.0
    for row, values in enumerate(exact.values.double()):
        recorded = torch.zeros_like(values)
        for block in exact.space.blocks:
            if block.name in train:
                recorded[block.start : block.stop] = train[block.name].gradients[row].flatten()
        worst = max(worst, float((recorded - values).norm() / values.norm()))
    if not worst < ALLOWED:
        raise SystemExit(f"{problem.name}: recorded gradients are {worst:.2g} of their norm away from the exact ones")
    return worst


def measure(problem: Problem, folder: Path, seeds: Sequence[int], subsets: int, repeats: int) -> dict[str, Any]:
    """LDS of each seed by ``METHOD: DAMPING``, and means over seeds of what :class:`Found` has beside."""
    trained = Retrainings(problem, folder)
    lds: dict[str, list[float]] = {}
    every: list[Found] = []
    for seed in seeds:
        drawn, model = draws(problem, seed, subsets=subsets, left_out=0), trained.model(seed)
        losses = np.mean([_losses(trained, seed, drawn.halves, r) for r in range(repeats)], axis=0)
        found = score(Trained(problem, model, training_seed(seed, 0)))
        every.append(found)
        for name, scores in found.scores.items():
            value = linear_datamodeling_score(scores.double().numpy(), losses, drawn.halves)
            lds.setdefault(name, []).append(float(np.nanmean(value)))
        print(f"seed {seed}: {PLAIN} {lds[PLAIN][-1]:.3f}, {SKETCHED} {lds[f'{SKETCHED}: auto'][-1]:.3f}", flush=True)
    seconds = {
        method: {part: float(np.median([one.seconds[method][part] for one in every])) for part in parts}
        for method, parts in every[0].seconds.items()
    }
    return {"lds": lds, "seconds": seconds, "numbers": every[0].numbers}


def _losses(trained: Retrainings, seed: int, halves: npt.NDArray[np.bool_], repeat: int) -> npt.NDArray[np.float64]:
    """``(subsets, n_query)``: after training on each half."""
    return np.array([trained.outcome(seed, np.flatnonzero(h), repeat=repeat, what="half").losses for h in halves])


def main() -> None:
    """One problem."""
    parser = parser_of(__doc__, SUBSETS, folder="evaluate")
    parser.add_argument("--subsets", type=int, help="halves of a seed (as bench.dampings)")
    parser.add_argument("--repeats", type=int, default=2, help="initialisations of every retraining (2)")
    args, came_from = begun(parser, lambda known: f"kronecker-{known.problem}", "evaluate")
    subsets = args.subsets or SUBSETS[args.problem]
    found = measure(make_problem(args.problem), args.folder, range(args.seeds), subsets, args.repeats)
    for name, values in found["lds"].items():
        print(f"{name:40} {np.mean(values):.3f}  {' '.join(f'{value:.3f}' for value in values)}")
    for name, parts in found["seconds"].items():
        print(f"{name:40} " + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items()))
    settings = {"seeds": args.seeds, "subsets": subsets, "repeats": args.repeats, "m": SKETCH_SIZE}
    write(args.json, came_from, {"settings": settings, **found})


if __name__ == "__main__":
    main()
