"""Influence of the single tokens of a training example, from the project's ``token_losses``.

The gradient of an example's loss is the sum of its tokens' gradients, so the tokens' influences add up to the
example's. Nothing of this is stored: it takes a pass of the model with one copy of the example for each token that has
a loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.app.project import MOST_TOKENS
from stepinfluence.app.runs.prepared import Prepared
from stepinfluence.app.runs.stored import StoredRun
from stepinfluence.attribution.curvature import Choice
from stepinfluence.attribution.features import Features, Parameters
from stepinfluence.attribution.sameness import losses_differ, precision
from stepinfluence.capture.session import isolated
from stepinfluence.errors import FeatureMismatchError, ProjectError
from stepinfluence.search import scores
from stepinfluence.store import Store, fold


@dataclass(frozen=True)
class TokenInfluence:
    """What each token of a training example did to some queries.

    Attributes:
        row: of the example.
        tokens: their texts; their numbers where the project has no ``tokens``.
        sdi: ``(Q, T, steps)`` float32; zero for tokens that have no loss. Their sum over T is the example's influence.
    """

    row: int
    tokens: tuple[str, ...]
    sdi: npt.NDArray[np.float32]


class _Copies:
    """Batches of copies of one example, one for each of some tokens; knows which tokens the present batch is about."""

    def __init__(self, prepared: Prepared, example: Any, places: Sequence[int], batch_size: int) -> None:
        self._prepared, self._example, self._size = prepared, example, batch_size
        self._places = places
        self.current: Sequence[int] = ()

    def __len__(self) -> int:
        return -(-len(self._places) // self._size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self._places), self._size):
            self.current = self._places[start : start + self._size]
            yield self._prepared.batch([self._example] * len(self.current))

    def ids(self, _: Any) -> list[int]:
        return list(self.current)

    def loss(self, model: torch.nn.Module, batch: Any) -> Tensor:
        """The loss of one token in each copy."""
        losses = self._prepared.project.token_losses(model, batch)
        places = torch.tensor(self.current, device=losses.device)
        return losses.gather(1, places[:, None]).squeeze(1)


def influence_by_token(
    run: StoredRun,
    train: Store,
    rows: Sequence[int],
    query: Sequence[Features],
    *,
    etas: Sequence[float] | None = None,
    parameters: Parameters = None,
    curvature: Choice = "none",
) -> list[TokenInfluence]:
    """What the tokens of some training examples did to some queries, by query step, summed over checkpoints.

    Args:
        rows: of ``train``.
        query: features of the queries per step, one for each of the run's checkpoints.
        etas, parameters, curvature: as for :func:`stepinfluence.search.scores`; the checkpoints' own etas if not given.

    Raises:
        ProjectError: the project has no ``token_losses``, it failed, or its losses do not add up to ``loss``.
        FeatureMismatchError: the example has changed since it was featurized.
        StepInfluenceError: the project or a checkpoint is not as it must be.
    """
    prepared, examples = run.prepared, run.examples(train, rows)
    weights = [c.eta for c in train.checkpoints] if etas is None else list(etas)
    batch_size = int(train.manifest.project.get("batch_size", 32))
    found = []
    for place, row in enumerate(rows):
        example = examples[place]
        features, count = _token_features(prepared, train, row, example, batch_size)
        result = scores(features, list(query), etas=weights, parameters=parameters, curvature=curvature, progress=False)
        sdi = np.zeros((result.sdi.shape[1], count, result.sdi.shape[2]), np.float32)
        sdi[:, list(features[0].ids)] = result.sdi.transpose(0, 1).float().cpu().numpy()
        texts = train.row(row).tokens or prepared.project.tokens(example) or ()
        shown = [*texts[:count], *(str(n + 1) for n in range(len(texts), count))]
        found.append(TokenInfluence(row, tuple(shown), sdi))
    return found


def _token_features(
    prepared: Prepared, train: Store, row: int, example: Any, batch_size: int
) -> tuple[list[Features], int]:
    """Features of one example by token, one for each checkpoint (or one if they are folded), and how many tokens there
    are; ids are the places of the tokens that have a loss at some checkpoint."""
    losses = [_losses(prepared, checkpoint, example) for checkpoint in range(prepared.count)]
    count = len(losses[0])
    if count > MOST_TOKENS:
        raise ProjectError(f"{prepared.project.path}: token_losses() gave {count:,} tokens; at most {MOST_TOKENS:,}")
    places = torch.stack(losses).ne(0).any(0).nonzero().flatten().tolist() or [0]
    features = []
    for checkpoint in range(prepared.count):
        where = prepared.visit(checkpoint)
        copies = _Copies(prepared, example, places, batch_size)
        part = prepared.capture.featurize(
            copies, copies.loss, per_step=False, ids=copies.ids, progress=False, verify=False
        )
        features.append(dataclasses.replace(part.to("cpu"), space=where.space))
    if prepared.config.fold:
        features = [fold(features, [c.eta for c in prepared.stored()], seed=prepared.config.seed)]
    _require_sum(prepared, train, row, features)
    return features, count


def _losses(prepared: Prepared, checkpoint: int, example: Any) -> Tensor:
    """``(T,)``: losses of an example's tokens."""
    prepared.visit(checkpoint)
    model = prepared.capture.model
    with isolated(model, training=prepared.capture.training), torch.no_grad():
        losses = prepared.project.token_losses(model, prepared.batch([example]))
    if len(losses) != 1:
        raise ProjectError(
            f"{prepared.project.path}: token_losses() returned shape {tuple(losses.shape)} for one example; return "
            "(1, T)"
        )
    return losses[0].float().cpu()


def _require_sum(prepared: Prepared, train: Store, row: int, features: Sequence[Features]) -> None:
    """Raise unless the tokens' losses add up to the loss that the row was stored with."""
    if prepared.capture.training:  # other dropout for other batches
        return
    eps = precision(prepared.capture.model, prepared.device)
    for checkpoint, part in enumerate(features):
        before, now = train.losses(checkpoint)[row], float(part.losses.double().sum())
        given = torch.tensor([float(before)], dtype=torch.float64)
        if not bool(losses_differ(given, torch.tensor([now], dtype=torch.float64), eps)):
            continue
        current = _whole_loss(prepared, train, row, checkpoint)
        if current is not None and bool(losses_differ(given, torch.tensor([current], dtype=torch.float64), eps)):
            raise FeatureMismatchError(
                f"{train.path}: row {row} had loss {before:.6g} at checkpoint {train.checkpoints[checkpoint].name}, "
                f"the project now gives {current:.6g}; put the data and the loss back, or featurize again"
            )
        raise ProjectError(
            f"{prepared.project.path}: token_losses() adds up to {now:.6g} for row {row} of {train.path.name}, loss() "
            f"is {before:.6g}; make them add up (where loss() is a mean, divide by the number of tokens)"
        )


def _whole_loss(prepared: Prepared, train: Store, row: int, checkpoint: int) -> float | None:
    """The loss of a row's example now; None where checkpoints are folded, whose losses are a mean."""
    if prepared.config.fold:
        return None
    prepared.visit(checkpoint)
    data = prepared.project.dataset(str(train.manifest.project.get("split", train.path.name)))
    model = prepared.capture.model
    with isolated(model, training=False), torch.no_grad():
        return float(prepared.project.loss(model, prepared.batch([data[row]]))[0])
