"""Step-Decomposed Influence from features (paper, eqs. 5-9).

Scores are oriented ``(n_train, n_query[, steps])``. Positive = training on the train example lowers the loss of the
query (a proponent), negative = raises it. Step axes are 0-based in tensors, 1-based in text and plots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stepinfluence.arguments import per_checkpoint
from stepinfluence.attribution.alignment import aligned_to, require_repeatable
from stepinfluence.attribution.checkpoints import Etas, PathLike, Reader
from stepinfluence.attribution.curvature.choice import SOURCE, Choice, Normalize, corrected, one_each
from stepinfluence.attribution.curvature.damping import Damping
from stepinfluence.attribution.curvature.length import TrainingTime
from stepinfluence.attribution.curvature.progress import training_time
from stepinfluence.attribution.curvature.unrolled import Unrolled
from stepinfluence.attribution.depth import added, lengths_of
from stepinfluence.attribution.extremes import TOO_LARGE, largest, tell_of_small
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.result import Decompose, Influence
from stepinfluence.attribution.visiting import Featurizer, Metric, path_list, visit_checkpoints
from stepinfluence.loaders import IdsOf, LossFn, is_one_shot

FeatureList: TypeAlias = Features | Sequence[Features]


def _as_list(features: FeatureList, side: str) -> list[Features]:
    several = [features] if isinstance(features, Features) or not isinstance(features, Sequence) else list(features)
    for one in several:
        if not isinstance(one, Features):
            raise TypeError(f"{side}: got {type(one).__name__}; pass Features, or a list of one for each checkpoint")
        one.require_whole(side)
    return several


def _aligned(
    train: FeatureList, query: FeatureList, etas: float | Sequence[float]
) -> list[tuple[Features, Features, float]]:
    """Pairs of features per checkpoint with their weight, checked to be comparable, rows in the first's order."""
    trains, queries = _as_list(train, "train"), _as_list(query, "query")
    if not trains or len(trains) != len(queries):
        raise ValueError(
            f"train, query: got features of {len(trains)} and {len(queries)} checkpoints; "
            "give one of each per checkpoint"
        )
    weights = per_checkpoint("etas", etas, len(trains))
    for side, group in (("train", trains), ("query", queries)):
        group[1:] = [aligned_to(group[0], other, side) for other in group[1:]]
    for t, q in zip(trains, queries, strict=True):
        t.space.require_equal(q.space)
        if t.values.device != q.values.device:
            raise ValueError(
                f"query: features on {q.values.device}, train on {t.values.device}; use features.to(device)"
            )
        if t.values.dtype != q.values.dtype:
            raise ValueError(f"query: features of {q.values.dtype}, train of {t.values.dtype}; featurize both with one")
    return list(zip(trains, queries, weights, strict=True))


def _corrected(
    pairs: list[tuple[Features, Features, float]], curvature: Choice, damping: Damping | None, normalize: Normalize
) -> list[tuple[Features, Features, float]]:
    """Pairs whose inner products are the scores that were asked for."""
    if isinstance(curvature, Unrolled) and any(eta != 1 for _, _, eta in pairs):
        raise ValueError("etas: SOURCE weights checkpoints by their segments' learning rates; leave etas at 1")
    sides = corrected(
        [t for t, _, _ in pairs], [x for _, x, _ in pairs], curvature=curvature, damping=damping, normalize=normalize
    )
    return [(t, x, eta) for t, x, (_, _, eta) in zip(*sides, pairs, strict=True)]


def influence(
    train: FeatureList,
    query: FeatureList,
    *,
    etas: float | Sequence[float] = 1.0,
    decompose: Decompose = "query",
    curvature: Choice = "none",
    damping: Damping | None = None,
    normalize: Normalize = None,
) -> Influence:
    """Step-resolved influence of training examples on queries, summed over checkpoints.

    Args:
        train: features of the training examples, one per checkpoint; rows are matched by ids. Per step where
            ``decompose`` is ``"train"`` or ``"both"``; otherwise summed features do.
        query: features of the queries, one per checkpoint. Per step where ``decompose`` is ``"query"`` or ``"both"``.
        etas: weight of each checkpoint, usually its learning rate (paper, eq. 1).
        decompose: ``"query"``: ``I_t = sum_k eta_k <grad(z), phi_t(z')>`` (default, eqs. 5 and 7); ``"train"``:
            ``<phi_t(z), grad(z')>`` (eq. 8); ``"both"``: ``<phi_s(z), phi_t(z')>`` (eq. 9).
        curvature: ``"none"``: the paper's estimator. ``"fisher"`` or ``"block"``: the query's features times
            ``(F + lambda)^-1`` of each checkpoint's train features (:mod:`stepinfluence.attribution.curvature`), which
            predicts retraining better; or what was fitted before, one per checkpoint. A fitted
            :class:`stepinfluence.curvature.Unrolled` (SOURCE) goes through training: the query's last features are
            transformed for every checkpoint, and ``etas`` stay 1. ``"source"`` is a store's to fit.
        damping: lambda, relative to the largest eigenvalue; chosen without retraining (``"auto"``) if not given; or one
            over training's length, which predicts retraining better where it is known
            (:class:`stepinfluence.curvature.TrainingTime`, one T per checkpoint).
        normalize: ``"train"`` or ``"both"``: divide an example's features by the norm of their sum over steps. A
            curvature is then fitted to the normalised rows, and needs a number as its damping.

    Returns:
        :class:`Influence`. Beyond the features and the result itself, memory is bounded by one summed copy of one
        checkpoint's features ``(N, D)`` or ``(Q, D)``, made only where features are given per step but needed summed;
        with a curvature, by the transformed queries and the eigenvectors; with ``normalize``, by a copy of all.

    Raises:
        FeatureMismatchError: features of different sketches, parameters, weights or examples.
        ValueError: numbers of checkpoints do not fit, or features are summed over steps but needed per step; a
            curvature cannot be fitted, or was fitted to other checkpoints; a score is too large for the dtype, or all
            are too small (a warning, if those of some queries are).
    """
    found, bounds = _bounded(train, query, etas, decompose, curvature, damping, normalize)
    tell_of_small(bounds, found.sdi.dtype, found.query_ids)
    return found


def _bounded(
    train: FeatureList,
    query: FeatureList,
    etas: float | Sequence[float],
    decompose: Decompose,
    curvature: Choice,
    damping: Damping | None,
    normalize: Normalize,
) -> tuple[Influence, Tensor]:
    """:func:`influence`, and what :func:`tell_of_small` is to know of the queries."""
    if decompose not in ("query", "train", "both"):
        raise ValueError(f"decompose: got {decompose!r}; use 'query', 'train' or 'both'")
    pairs = _aligned(train, query, etas)
    for side, features in (("train", [t for t, _, _ in pairs]), ("query", [x for _, x, _ in pairs])):
        if decompose in (side, "both") and not all(f.per_step for f in features):
            raise ValueError(
                f"{side}: features are summed over steps; featurize with per_step=True for decompose={decompose!r}"
            )
    pairs = _corrected(pairs, curvature, damping, normalize)
    first_train, first_query, _ = pairs[0]
    n, q = len(first_train), len(first_query)
    steps_train = max(t.values.shape[1] if decompose != "query" else 1 for t, _, _ in pairs)
    steps_query = max(x.values.shape[1] if decompose != "train" else 1 for _, x, _ in pairs)
    sdi = torch.zeros(n, steps_train, q, steps_query, dtype=first_train.values.dtype, device=first_train.values.device)
    for t, x, eta in pairs:
        left = t.values if decompose != "query" else t.summed().values.unsqueeze(1)
        right = x.values if decompose != "train" else x.summed().values.unsqueeze(1)
        block = sdi[:, : left.shape[1], :, : right.shape[1]]
        for s in range(left.shape[1]):
            rows = block[:, s]
            if rows.is_contiguous():
                rows.view(n, q * right.shape[1]).addmm_(left[:, s], right.flatten(0, 1).T, alpha=eta)
            else:
                for k in range(right.shape[1]):
                    rows[..., k] += eta * (left[:, s] @ right[:, k].T)
    if decompose == "both":
        result = sdi.transpose(1, 2)
    else:
        result = sdi[:, 0] if decompose == "query" else sdi[..., 0].transpose(1, 2)
    found = Influence(
        sdi=result,
        decompose=decompose,
        train_ids=first_train.ids,
        query_ids=first_query.ids,
        etas=tuple(eta for _, _, eta in pairs),
        energies=_energy(result) if len(pairs) == 1 else None,
        train_lengths=lengths_of([t for t, _, _ in pairs]) if decompose != "query" else None,
        query_lengths=lengths_of([x for _, x, _ in pairs]) if decompose != "train" else None,
    )
    return found, _bounds(pairs, largest(result, (0, *range(2, result.dim()))), result.dtype)


def _bounds(pairs: list[tuple[Features, Features, float]], peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """``(Q,)``: largest products of numbers of rows and queries, as :func:`tell_of_small` takes them; infinite where
    a score ``(Q,)`` shows that there is no need to look.

    Raises:
        ValueError: a score is not finite though all features are.
    """
    if not bool(peaks.isfinite().all()) and all(bool(f.values.isfinite().all()) for t, x, _ in pairs for f in (t, x)):
        raise ValueError(TOO_LARGE)
    if bool((peaks >= torch.finfo(dtype).tiny).all()):
        return torch.full_like(peaks, torch.inf)
    bounds = torch.zeros_like(peaks)
    for t, x, eta in pairs:
        of_queries = largest(x.values, tuple(range(1, x.values.dim())))
        rows = float(largest(t.values.flatten(), 0))
        bounds = torch.maximum(bounds, of_queries * rows * min(1.0, abs(eta)))
    return torch.where(peaks < torch.finfo(dtype).tiny, bounds, torch.inf)


def _energy(sdi: Tensor) -> Tensor:
    """``(1, Q)``: absolute influence, summed example by example so that no second copy of all scores is made."""
    total = sdi.new_zeros(sdi.shape[1])
    for one in sdi:
        total += one.abs().flatten(1).sum(1)
    return total.unsqueeze(0)


def self_influence(
    train: FeatureList,
    *,
    etas: float | Sequence[float] = 1.0,
    curvature: Choice = "none",
    damping: Damping | None = None,
) -> Tensor:
    """Self-influence of each example by its own loop steps: ``sum_k eta_k <phi_t(z), grad(z)>``.

    Its sum over steps is TracIn's self-influence, the diagonal of train x train (paper, section 4). With a curvature it
    is the leverage ``sum_k eta_k <phi_t, (F_k + lambda_k)^-1 grad>``: large for examples that no others explain.

    Args:
        train: features, one per checkpoint; summed features give the total only.
        etas: weight of each checkpoint.
        curvature, damping: as for :func:`influence`.

    Returns:
        ``(N, steps)`` for per-step features, ``(N,)`` for summed ones.

    Raises:
        FeatureMismatchError, ValueError: as for :func:`influence`; too small is an error only if all are.
    """
    if isinstance(curvature, Unrolled) or curvature == SOURCE:
        raise ValueError("curvature: self-influence by SOURCE is not offered; use 'fisher' or 'block'")
    pairs = _aligned(train, train, etas)
    grads = [features.summed() for features, _, _ in pairs]
    _, solved = corrected([t for t, _, _ in pairs], grads, curvature=curvature, damping=damping)
    total: Tensor | None = None
    for (features, _, eta), summed, other in zip(pairs, grads, solved, strict=True):
        grad = other.values
        if features.per_step:
            term = eta * torch.einsum("nsd,nd->ns", features.values, grad)
        else:
            term = eta * (summed.values * grad).sum(1)
        if total is not None and total.dim() != term.dim():
            raise ValueError("train: features of some checkpoints are summed over steps, of others not")
        total = term if total is None else added(total, term, term.dim() - 1)
    assert total is not None
    # An example's own score may be as small as it likes beside those of others: it is one question, about all.
    asked = [
        (t, replace(other, values=other.values.reshape(1, -1)), eta)
        for (t, _, eta), other in zip(pairs, solved, strict=True)
    ]
    tell_of_small(_bounds(asked, largest(total.flatten(), 0).view(1), total.dtype), total.dtype, ("all",))
    return total


def influence_over_checkpoints(
    capture: Featurizer,
    checkpoints: PathLike | Sequence[PathLike],
    train: Iterable[Any],
    query: Iterable[Any],
    loss_fn: LossFn,
    *,
    etas: Etas = "optimizer",
    metric: Metric | None = None,
    decompose: Decompose = "query",
    curvature: Choice = "none",
    damping: Damping | None = None,
    normalize: Normalize = None,
    ids: IdsOf | None = None,
    progress: bool = True,
    strict: bool = True,
    reader: Reader | None = None,
) -> Influence:
    """Influence summed over saved checkpoints (paper, eqs. 1 and 5), holding the features of one checkpoint at a time.

    The model's weights are put back afterwards.

    Args:
        capture: from :func:`~stepinfluence.attach`, or an :class:`~stepinfluence.ExactCapture`.
        checkpoints: paths of checkpoints of the capture's model, or one path.
        train, query: loaders, iterated at every checkpoint: they must give the same examples each time, in the same
            order unless there are ``ids``, by which rows are matched.
        loss_fn: ``loss_fn(model, batch) -> (B,)``.
        etas: ``"optimizer"`` (the learning rate in each checkpoint's optimizer state), one number, or one each.
        metric: under which inner product: ``"sgd"``, or ``"adam"`` or ``"adafactor"`` as each checkpoint's optimizer
            state has it (:func:`stepinfluence.attribution.preconditioners.from_optimizer`), or a function from
            :class:`~stepinfluence.Checkpoint` to a preconditioner. None: the capture's own, for all checkpoints.
        decompose: as for :func:`influence`; only the side that is decomposed is featurized per step.
        curvature, damping, normalize: as for :func:`influence`; each checkpoint has a curvature of its own, so that
            none owns the sum because its gradients are large: see the result's ``shares``. ``damping="training"`` reads
            training's length by each checkpoint from its optimizer's state (:func:`.curvature.training_time`), for
            which every file is read once more.
        ids: as for ``Capture.featurize``.
        progress: show progress bars.
        strict: False for checkpoints with a part of the weights, such as adapters only: all others stay as they are
            in the model. The body's trainable weights must be there all the same.
        reader: a function of yours that reads a checkpoint, see :func:`~stepinfluence.load_checkpoint`.

    Raises:
        CheckpointError: a checkpoint cannot be read, does not fit, or has no (single) learning rate, or no state of the
            metric's optimizer.
        FeatureMismatchError, ValueError: as for :func:`influence`; no checkpoint; a loader that cannot be gone through
            again or draws a new order without ids; or the checkpoints' features differ in examples or loop steps.
            Errors of ``featurize`` pass through.
    """
    checkpoints = path_list(checkpoints)
    if not checkpoints:
        raise ValueError("checkpoints: got none; pass at least one path")
    for side, loader in (("train", train), ("query", query)):
        if len(checkpoints) > 1 or (train is query and is_one_shot(train)):
            require_repeatable(loader, side, has_ids=ids is not None)
    curvatures = one_each(curvature, len(checkpoints))
    dampings = _dampings(damping, capture, checkpoints, metric, reader)
    rows: list[Features] = []
    total: Influence | None = None
    bounds = torch.zeros((), dtype=torch.float64)
    # Closed at once, also after an error: only then the model has its own weights again.
    visits = visit_checkpoints(capture, checkpoints, etas, metric, progress=progress, strict=strict, reader=reader)
    with closing(visits) as visited:
        for eta, one, damp in zip(visited, curvatures, dampings, strict=True):
            sides = [
                capture.featurize(loader, loss_fn, per_step=decompose in (side, "both"), ids=ids, progress=progress)
                for side, loader in (("train", train), ("query", query))
            ]
            if rows:
                pairs = zip(rows, sides, ("train", "query"), strict=True)
                sides = [aligned_to(first, found, side) for first, found, side in pairs]
            else:  # what rows are told apart by, without their values
                rows = [replace(found, values=found.values[:0]) for found in sides]
            found, bound = _bounded(sides[0], sides[1], eta, decompose, one, damp, normalize)
            total, bounds = _add(total, found), torch.maximum(bounds, bound)
    assert total is not None
    tell_of_small(bounds, total.sdi.dtype, total.query_ids)
    return total


def _dampings(
    damping: Damping | None,
    capture: Featurizer,
    checkpoints: Sequence[PathLike],
    metric: Metric | None,
    reader: Reader | None,
) -> list[Damping | None]:
    """The damping of each checkpoint.

    Raises:
        CheckpointError, ValueError: training's length is asked for and not known (says why), or not given for each.
    """
    if damping == "training":
        if callable(metric) or (metric is None and capture.preconditioner is not None):
            raise ValueError(
                "damping: 'training' is known for metric='sgd' and 'adam', and this is one of your own; pass a "
                "stepinfluence.curvature.TrainingTime"
            )
        damping = training_time(checkpoints, capture, metric=metric or "sgd", reader=reader)
    if isinstance(damping, TrainingTime):
        return [damping.at(k, len(checkpoints)) for k in range(len(checkpoints))]
    return [damping] * len(checkpoints)


def _add(total: Influence | None, one: Influence) -> Influence:
    if total is None:
        return one
    assert total.energies is not None
    assert one.energies is not None
    energies = torch.cat([total.energies, one.energies])
    return replace(
        total,
        sdi=added(total.sdi, one.sdi, 2),
        etas=total.etas + one.etas,
        energies=energies,
        train_lengths=_longer(total.train_lengths, one.train_lengths),
        query_lengths=_longer(total.query_lengths, one.query_lengths),
    )


def _longer(some: Tensor | None, others: Tensor | None) -> Tensor | None:
    return None if some is None or others is None else torch.maximum(some, others)
