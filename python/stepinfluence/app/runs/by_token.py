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
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.sameness import losses_differ, precision
from stepinfluence.attribution.space import Parameters
from stepinfluence.capture.session import isolated
from stepinfluence.errors import FeatureMismatchError, ProjectError
from stepinfluence.search import scores
from stepinfluence.store import Store, fold


@dataclass(frozen=True)
class TokenFeatures:
    """A training example's features by token.

    Attributes:
        row: of the example.
        tokens: their texts; their numbers where the project has no ``tokens``.
        features: ``(T, D)``, one for each of the run's checkpoints (or one if they are folded); zero for tokens that
            have no loss. Their sum over T is the example's feature.
    """

    row: int
    tokens: tuple[str, ...]
    features: tuple[Features, ...]

    def influence(
        self,
        query: Sequence[Features],
        *,
        etas: Sequence[float],
        parameters: Parameters = None,
        curvature: Choice = "none",
    ) -> npt.NDArray[np.float32]:
        """``(Q, T, steps)``: what each token did to some queries, summed over checkpoints.

        Args:
            query: features of the queries per step, one for each checkpoint.
            etas, parameters, curvature: as for :func:`stepinfluence.search.scores`.

        Raises:
            FeatureMismatchError, ValueError: as for :func:`stepinfluence.search.scores`.
        """
        found = scores(
            self.features, list(query), etas=etas, parameters=parameters, curvature=curvature, progress=False
        )
        return np.asarray(found.sdi.transpose(0, 1).float().cpu().numpy())


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


def token_features(run: StoredRun, train: Store, rows: Sequence[int]) -> list[TokenFeatures]:
    """Features of some training examples by token, at the run's checkpoints; each of them is loaded once.

    Args:
        rows: of ``train``.

    Raises:
        ProjectError: the project has no ``token_losses``, it failed, or its losses do not add up to ``loss``.
        FeatureMismatchError: an example has changed since it was featurized.
        StepInfluenceError: the project or a checkpoint is not as it must be.
    """
    prepared, examples = run.prepared, run.examples(train, rows)
    batch_size = int(train.manifest.project.get("batch_size", 32))
    given = [examples[place] for place in range(len(rows))]
    by_row: list[list[Features]] = [[] for _ in rows]
    for checkpoint in range(prepared.count):
        space = prepared.visit(checkpoint).space
        for found, example in zip(by_row, given, strict=True):
            found.append(dataclasses.replace(_by_token(prepared, example, batch_size), space=space))
    result = []
    for row, example, features in zip(rows, given, by_row, strict=True):
        if prepared.config.fold:
            features = [fold(features, [c.eta for c in prepared.stored()], seed=prepared.config.seed)]
        _require_sum(prepared, train, row, features)
        count = len(features[0])
        texts = train.row(row).tokens or prepared.project.tokens(example) or ()
        shown = [*texts[:count], *(str(n + 1) for n in range(len(texts), count))]
        result.append(TokenFeatures(row, tuple(shown), tuple(features)))
    return result


def _by_token(prepared: Prepared, example: Any, batch_size: int) -> Features:
    """Features ``(T, D)`` of one example by token at the checkpoint that ``prepared`` is at."""
    model, project = prepared.capture.model, prepared.project
    with isolated(model, training=prepared.capture.training), torch.no_grad():
        losses = project.token_losses(model, prepared.batch([example]))
    if len(losses) != 1:
        raise ProjectError(
            f"{project.path}: token_losses() returned shape {tuple(losses.shape)} for one example; return (1, T)"
        )
    count = losses.shape[1]
    if not 1 <= count <= MOST_TOKENS:
        raise ProjectError(f"{project.path}: token_losses() gave {count:,} tokens; give 1 to {MOST_TOKENS:,}")
    places = losses[0].ne(0).nonzero().flatten().tolist() or [0]
    copies = _Copies(prepared, example, places, batch_size)
    part = prepared.capture.featurize(
        copies, copies.loss, per_step=False, ids=copies.ids, progress=False, verify=False
    ).to("cpu")
    values, each = part.values.new_zeros(count, part.values.shape[1]), part.losses.new_zeros(count)
    values[places], each[places] = part.values, part.losses
    steps = part.steps.new_full((count,), int(part.steps.max()))
    return dataclasses.replace(part, values=values, losses=each, steps=steps, ids=tuple(range(count)))


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
