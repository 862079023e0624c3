"""Going through checkpoints: each one's weights, metric and eta in turn, and the model's own again at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import nn

from stepinfluence.attribution.checkpoints import Checkpoint, Etas, PathLike, Reader, load_checkpoint, resolve_etas
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.preconditioners import KINDS, Kind, Preconditioner, from_optimizer
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.loaders import IdsOf, LossFn
from stepinfluence.progress import tqdm

Metric: TypeAlias = Kind | Callable[[Checkpoint], Preconditioner | None]


class Featurizer(Protocol):
    """What features come from: :class:`~stepinfluence.Capture` and :class:`~stepinfluence.ExactCapture` are such."""

    model: nn.Module

    @property
    def preconditioner(self) -> Preconditioner | None: ...

    def precondition(self, preconditioner: Preconditioner | None) -> None: ...

    def space(self) -> FeatureSpace: ...

    def featurize(
        self, loader: Iterable[Any], loss_fn: LossFn, *, per_step: bool, ids: IdsOf | None, progress: bool
    ) -> Features: ...


def path_list(checkpoints: PathLike | Sequence[PathLike]) -> Sequence[PathLike]:
    """Paths of checkpoints; one path stands for a list of it, and is not gone through letter by letter."""
    if isinstance(checkpoints, str | Path):
        return [checkpoints]
    if not isinstance(checkpoints, Sequence):
        raise TypeError(
            f"checkpoints: got {type(checkpoints).__name__} {checkpoints!r}; pass a path, or a list of paths"
        )
    return checkpoints


def visit_checkpoints(
    capture: Featurizer,
    checkpoints: Sequence[PathLike] | None,
    etas: Etas,
    metric: Metric | None = None,
    *,
    progress: bool = False,
    strict: bool = True,
    reader: Reader | None = None,
) -> Generator[float, None, None]:
    """Put each checkpoint's weights (and metric) into a capture in turn and give its weight eta; the model's own
    weights are put back when the generator is closed. Without checkpoints: the model as it is, for which ``etas`` is
    one number.

    Raises:
        CheckpointError, ValueError: as for :func:`stepinfluence.influence_over_checkpoints`.
    """
    if isinstance(metric, str) and metric not in KINDS:
        raise ValueError(f"metric: got {metric!r}; use {', '.join(map(repr, KINDS))}, or a function of a checkpoint")
    if checkpoints is None:
        if metric is not None:
            raise ValueError("metric: needs checkpoints=; for the model as it is, attach with a preconditioner")
        given = [etas] if isinstance(etas, int | float) else etas
        if isinstance(given, str) or len(given) != 1:
            raise ValueError("checkpoints: got None; pass the files of the checkpoints that the etas are for")
        yield float(given[0])
        return
    eta_of = resolve_etas(checkpoints, etas)
    original = copy.deepcopy(capture.model.state_dict())  # deep: modules may add values that are no tensors
    before = capture.preconditioner
    body = [block.name for block in capture.space().blocks]
    try:
        for index, path in enumerate(tqdm(checkpoints, desc="checkpoints", delay=2, disable=not progress)):
            checkpoint = load_checkpoint(path, reader=reader)
            eta = eta_of(index, checkpoint)
            if not strict:  # nothing of the checkpoint before may be left
                capture.model.load_state_dict(original)
            checkpoint.load_into(capture.model, strict=strict, needed=body)
            if callable(metric):
                capture.precondition(metric(checkpoint))
            elif metric is not None:
                capture.precondition(from_optimizer(checkpoint.optimizer, capture.model, metric))
            yield eta
    finally:
        capture.model.load_state_dict(original)
        capture.precondition(before)
