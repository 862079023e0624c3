"""What is measured: errors against depth, sparsity, checkpoints and the angle of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from stepinfluence.attribution.space import Block
from torch import Tensor

from reproduce.arrays import Array
from reproduce.error.config import FAMILIES, Config, LemmaConfig
from reproduce.error.gradients import Gradients, Pairs, blocks_of, exact, rounding, scores, sketch
from reproduce.error.statistics import effective_number, recall, slope_through_zero
from reproduce.error.training import Checkpoint, accuracy, examples, make_model, train
from sdi_kernels import HashFamily, TensorSketch, sketch_matrix_grads, variance_bound

ORTHOGONAL = "orthogonal"
STRUCTURES = ("entries", "rows", "columns")
NEGLIGIBLE = 1e-12
"""Pairs whose product of norms is below this share of the largest have no error to be divided by it."""


class Models:
    """Trained models of a seed, each made when first needed: finished stages need none of them."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """Of one training at the model's own number of steps; the last is the trained model."""
        model = make_model(self.config, self.seed)
        return train(self.config, model, self.seed, checkpoints=max(self.config.lemma.checkpoints))


def error_numbers(pairs: Pairs, m: int, hashing: HashFamily, seeds: range) -> dict[str, Any]:
    """What is kept of the errors of one family.

    Returns:
        ``relative``, ``relative_cross`` (pairs of different examples) and ``bias`` (least-squares slope of the error on
        the exact score), a value for each sketch; ``normalised``, the root mean square of errors over ``|g| |p_t|``;
        ``bound_normalised`` and ``bound_relative``, what the first and the relative error cannot exceed in expectation;
        ``kurtosis`` of normalised errors (3 for a normal distribution) and ``zeros``, the share that are zero.
    """
    truth, size = pairs.truth, pairs.sizes
    found, limit = pairs.errors(m, hashing, seeds), pairs.bound(m, hashing)
    cross = ~torch.eye(*truth.shape[:2], dtype=torch.bool)
    counted = size > NEGLIGIBLE * size.max()
    unit = (found / size)[:, counted]
    return {
        "relative": (found.flatten(1).norm(dim=1) / truth.norm()).tolist(),
        "relative_cross": (found[:, cross].flatten(1).norm(dim=1) / truth[cross].norm()).tolist(),
        "bias": [slope_through_zero(truth.numpy(), one.numpy()) for one in found],
        "normalised": float(unit.square().mean().sqrt()),
        "bound_normalised": float((limit / size.square())[counted].mean().sqrt()),
        "bound_relative": float(limit.sum().sqrt() / truth.norm()),
        "kurtosis": float(unit.pow(4).mean() / unit.square().mean().square()),
        "zeros": float((unit.abs() < 1e-7).double().mean()),
    }


def by_family(pairs: Pairs, config: Config, draws: int) -> dict[str, dict[str, Any]]:
    """:func:`error_numbers` of every family at the config's sketch size."""
    seeds = range(config.seed, config.seed + draws)
    return {h: error_numbers(pairs, config.sketch_size, h, seeds) for h in FAMILIES}


# ----------------------------------------------------------------------------------------------------------------
# Depth


def depth(config: Config, kind: str, *, trained: bool, seed: int) -> dict[str, Any]:
    """Errors of the same weights at every number of loop steps.

    Args:
        config: the run's.
        kind: of :data:`~reproduce.error.training.KINDS`, or :data:`ORTHOGONAL`: no model, but independent normal step
            gradients of equal size, the worst that depth can do.
        trained: with random numbers of steps; else random weights.
        seed: of the model.

    Returns:
        ``levels``: for each number of steps ``families`` (:func:`by_family`), ``effective`` (how many steps hold the
        query's squared gradient), ``cosine`` (root mean square of ``cos(g, p_t)``, weighted by size), ``accuracy`` and
        ``rounding`` (of ``attach`` against sketches of exact gradients), the latter two None where there is no model.
    """
    part, batch = config.depth, examples(config, config.depth.examples)
    model = make_model(config, seed, kind="adapter" if kind == ORTHOGONAL else kind)
    if trained:
        train(config, model, seed, mean_loops=part.mean_loops)
    generator = torch.Generator().manual_seed(seed)
    modelled, levels = kind != ORTHOGONAL, []
    for loops in part.loops:
        if modelled:
            query = exact(model, batch, loops=loops)
        else:
            query = _independent(blocks_of(model), loops, part.examples, generator)
        pairs = Pairs(query.summed(), query)
        levels.append(
            {
                "loops": loops,
                "families": by_family(pairs, config, part.draws),
                "effective": effective_number(query.values.square().sum(-1).double().numpy()),
                "cosine": float(pairs.truth.norm() / pairs.sizes.norm()),
                "accuracy": accuracy(model, batch, loops=loops) if modelled else None,
                "rounding": rounding(model, batch, query, config.sketch_size, "balanced") if modelled else None,
            }
        )
    return {"levels": levels}


def _independent(blocks: tuple[Block, ...], loops: int, count: int, generator: torch.Generator) -> Gradients:
    """Normal step gradients, independent of one another."""
    return Gradients(torch.randn(count, loops, blocks[-1].stop, generator=generator), blocks)


# ----------------------------------------------------------------------------------------------------------------
# Sparsity


def masked(models: Models) -> dict[str, Any]:
    """Errors of a trained model's gradients of which only the largest parts are kept, by structure and share.

    Returns:
        ``levels``: for each structure and share, ``families`` and the ``kept`` shares of non-zero entries.
    """
    config, part = models.config, models.config.sparsity
    query = exact(models.checkpoints[-1].model, examples(config, part.examples)).matrices()
    whole, levels = query.summed(), []
    for structure in STRUCTURES:
        for share in part.shares:
            left, right = (keep_largest(side, structure, share) for side in (whole, query))
            levels.append({"structure": structure, **_sparse_numbers(left, right, config)})
    return {"levels": levels}


def active(models: Models) -> dict[str, Any]:
    """Errors of models whose tokens use few hidden units, trained as such; on the MLP's two matrices alone.

    Returns:
        ``levels``, as :func:`masked`, with ``active`` and the model's ``accuracy``.
    """
    config, part, levels = models.config, models.config.sparsity, []
    batch = examples(config, part.examples)
    for units in part.active:
        if units == config.model.mlp_ratio * config.model.d_model:
            model = models.checkpoints[-1].model  # all of them
        else:
            model = make_model(config, models.seed, active=units)
            train(config, model, models.seed)
        query = exact(model, batch).matrices("mlp")
        found = _sparse_numbers(query.summed(), query, config)
        levels.append({"structure": "active", "active": units, "accuracy": accuracy(model, batch), **found})
    return {"levels": levels}


def _sparse_numbers(left: Gradients, right: Gradients, config: Config) -> dict[str, Any]:
    pairs = Pairs(left, right)
    return {
        "kept": float((right.values != 0).double().mean()),
        "kept_summed": float((left.values != 0).double().mean()),
        "cosine": float(pairs.truth.norm() / pairs.sizes.norm()),
        "families": by_family(pairs, config, config.sparsity.draws),
    }


def keep_largest(gradients: Gradients, structure: str, share: float) -> Gradients:
    """Each matrix with its largest entries (by size), rows or columns (by norm) alone; at least one of them.

    Raises:
        ValueError: unknown structure.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure: got {structure!r}; use one of {', '.join(STRUCTURES)}")
    values = torch.zeros_like(gradients.values)
    for block in gradients.blocks:
        matrix = gradients.of(block)
        rows, columns = block.shape
        strength = {
            "entries": lambda m: m.abs(),
            "rows": lambda m: m.norm(dim=-1, keepdim=True).expand_as(m),
            "columns": lambda m: m.norm(dim=-2, keepdim=True).expand_as(m),
        }[structure](matrix).flatten(-2)
        unit = {"entries": 1, "rows": columns, "columns": rows}[structure]
        count = unit * max(1, round(share * rows * columns / unit))
        chosen = strength.topk(count, dim=-1).indices
        kept = torch.zeros_like(strength).scatter(-1, chosen, matrix.flatten(-2).gather(-1, chosen))
        values[..., block.start : block.stop] = kept
    return Gradients(values, gradients.blocks)


# ----------------------------------------------------------------------------------------------------------------
# Lemma 1


def lemma(models: Models) -> dict[str, Any]:
    """Mean squared errors of sums over K checkpoints that share their hashes, beside eq. 12.

    Returns:
        By family, ``(values of K, pairs and steps)``: ``mse`` and its standard error ``se``, ``independent`` (the mean
        squared error had each checkpoint hashes of its own), and ``own`` (the family's own bound). ``lemma``: the right
        side of eq. 12. ``etas``: of the checkpoints.
    """
    config, part = models.config, models.config.lemma
    batch, count = examples(config, 2 * part.examples), part.examples
    points = models.checkpoints
    sides = [exact(c.model, batch) for c in points]
    each = [Pairs(Gradients(g.values[:count].sum(1), g.blocks), Gradients(g.values[count:], g.blocks)) for g in sides]
    # All checkpoints side by side, so that a draw of the tables sketches them at once.
    left = replace(each[0].train, values=torch.stack([p.train.values for p in each]))
    right = replace(each[0].query, values=torch.stack([p.query.values for p in each]))
    etas = torch.tensor([c.eta for c in points], dtype=torch.float64)[:, None, None, None]
    m, seeds = config.sketch_size, range(config.seed, config.seed + part.draws)
    result: dict[str, Any] = {"etas": etas.flatten().tolist()}
    sizes, truth = (torch.stack([getattr(p, name) for p in each]) for name in ("sizes", "truth"))
    factor = 4 / m**2 + 6 / m
    result["lemma"] = np.stack([factor * (etas * sizes)[c].sum(0).square().flatten().numpy() for c in _chosen(part)])
    for hashing in FAMILIES:
        # (draws, checkpoints, N, Q, steps): the same draw has the same tables at every checkpoint.
        found = torch.stack(
            [_scores_of_each(sketch(left, m, hashing, s), sketch(right, m, hashing, s)) - truth for s in seeds]
        )
        limits = torch.stack([p.bound(m, hashing) for p in each]).sqrt()
        kept: dict[str, list[Array]] = {name: [] for name in ("mse", "se", "independent", "own")}
        for c in _chosen(part):
            weighted = (etas * found)[:, c]
            squared = weighted.sum(1).square()
            kept["mse"].append(squared.mean(0).flatten().numpy())
            kept["se"].append((squared.std(0) / len(seeds) ** 0.5).flatten().numpy())
            kept["independent"].append(weighted.square().mean(0).sum(0).flatten().numpy())
            kept["own"].append((etas * limits)[c].sum(0).square().flatten().numpy())
        result |= {f"{name}_{hashing}": np.stack(values) for name, values in kept.items()}
    return result


def _scores_of_each(left: Tensor, right: Tensor) -> Tensor:
    """Scores at each checkpoint, ``(K, N, Q, steps)``."""
    return torch.stack([scores(a, b) for a, b in zip(left, right, strict=True)])


def _chosen(part: LemmaConfig) -> Iterator[Tensor]:
    """For each K, which checkpoints: at even distances, the last among them."""
    count = max(part.checkpoints)
    for k in part.checkpoints:
        yield torch.arange(count // k - 1, count, count // k)


def tight(config: Config) -> dict[str, Any]:
    """The mean squared error over the bound for what comes closest: matrices of ones.

    One checkpoint is enough: K equal ones with shared hashes make K times its error, and K times its bound (squared
    both).

    Returns:
        By family ``ratio``, to the lemma's bound, ``own``, to the family's, and ``se`` of the first.
    """
    part, m = config.lemma, config.sketch_size
    side, limit = part.tight_size, 4 / m**2 + 6 / m
    ones = torch.ones(side, side)
    found: dict[str, Any] = {}
    for hashing in FAMILIES:
        drawn = []
        for seed in range(config.seed, config.seed + part.tight_draws):
            sides = TensorSketch(side, side, m, seed=seed, name="ones", hashing=hashing)
            one = sketch_matrix_grads(ones, sides).double()
            drawn.append(float(one @ one) / side**2 - 1)
        squared = np.square(drawn)
        found[hashing] = {
            "ratio": float(squared.mean() / limit),
            "own": float(squared.mean() / variance_bound((side, side), m, hashing)),
            "se": float(squared.std(ddof=1) / len(squared) ** 0.5 / limit),
        }
    return found


# ----------------------------------------------------------------------------------------------------------------
# Nearly orthogonal pairs


def search(models: Models, *, trained: bool) -> dict[str, Any]:
    """Errors by the angle of a pair, and recall of the leading training examples before and after re-ranking.

    Returns:
        By family: ``recall`` and ``recall_steps`` ``(sizes, draws, candidates)``, of the sums and of single steps;
        ``error`` ``(sizes, bins)``: root mean square error over root mean square score in a bin of cosines, ``limit``
        the same of the bound. ``pairs``: share of (pair, step) in each bin; ``union`` ``(sizes, candidates)``: share of
        the training set that is some query's candidate (``balanced``).
    """
    config, part = models.config, models.config.search
    model = models.checkpoints[-1].model if trained else make_model(config, models.seed)
    batch = examples(config, part.train + part.queries)
    whole = exact(model, {k: v[: part.train] for k, v in batch.items()}, per_step=False)
    query = exact(model, {k: v[part.train :] for k, v in batch.items()})
    pairs = Pairs(whole, query)
    truth = pairs.truth
    cosine = torch.where(pairs.sizes > 0, truth.abs() / pairs.sizes, 0.0)
    bins = torch.bucketize(cosine, torch.tensor(part.cosines, dtype=torch.float64))
    count = len(part.cosines) + 1
    result: dict[str, Any] = {"pairs": np.bincount(bins.flatten().numpy(), minlength=count) / bins.numel()}
    for hashing in FAMILIES:
        rows: dict[str, list[Any]] = {name: [] for name in ("recall", "recall_steps", "error", "limit", "union")}
        for m in part.sizes:
            seeds = range(config.seed, config.seed + part.draws)
            found = torch.stack([pairs.sketched(m, hashing, s) for s in seeds])
            squares = (found - truth).square().mean(0), pairs.bound(m, hashing)
            for name, values in zip(("error", "limit"), squares, strict=True):
                rows[name].append([_ratio(values, truth, bins == b) for b in range(count)])
            sums = [recall(one.sum(-1).numpy(), truth.sum(-1).numpy(), part.top, part.candidates) for one in found]
            rows["recall"].append([one[0] for one in sums])
            rows["union"].append(np.mean([one[1] for one in sums], axis=0))
            steps = [
                recall(one.flatten(1).numpy(), truth.flatten(1).numpy(), part.top, part.candidates)[0] for one in found
            ]
            rows["recall_steps"].append(steps)
        result |= {f"{name}_{hashing}": np.array(values) for name, values in rows.items()}
    return result


def _ratio(squares: Tensor, truth: Tensor, chosen: Tensor) -> float:
    """Root of the mean of ``squares`` over that of the squared scores, among chosen pairs; NaN where there are none."""
    if not bool(chosen.any()) or not bool(truth[chosen].any()):
        return float("nan")
    return float((squares[chosen].mean() / truth[chosen].square().mean()).sqrt())
