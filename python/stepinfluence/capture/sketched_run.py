"""One run through batches with one loss function: features, and what was seen and verified on the way."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepinfluence.attribution.features import FeatureBuilder
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.capture import diagnosis, session
from stepinfluence.capture.discovery import warn_if_the_loop_is_elsewhere
from stepinfluence.capture.owners.rows import Told
from stepinfluence.capture.passes import TappedModel
from stepinfluence.capture.recording.recorder import SketchRecorder
from stepinfluence.capture.recording.sketching import Sketching
from stepinfluence.capture.told import Ledger
from stepinfluence.capture.uses.usage import Usage
from stepinfluence.capture.verification import Verification
from stepinfluence.capture.verified import Checked

VERIFIED_SHARE = 1 / 64
"""Share of the batches after the first that are verified again, picked by seed and position."""


@dataclass
class SketchedRun:
    """Featurizes batches one after the other; made by :meth:`Capture.begin`.

    Attributes:
        tapped, sketching: what features are made with.
        space: what their columns mean.
        loss_fn: of the run.
        checked: the ways of telling examples apart that were verified.
        verifying: whether others are verified.
        reduced: whether a loss may be one number for the batch, repeated.
        usage: which parameters were used.
        ledger: counts uses.
        told: how the owners of the last batch's rows were known.
    """

    tapped: TappedModel
    sketching: Sketching
    space: FeatureSpace
    loss_fn: session.LossFn
    checked: Checked
    verifying: bool
    reduced: bool
    usage: Usage = field(default_factory=Usage)
    ledger: Ledger = field(default_factory=Ledger)
    told: Told = "followed"

    def featurize_batch(
        self, builder: FeatureBuilder, batch: Any, ids: Sequence[Hashable] | None, index: int
    ) -> Tensor:
        """Add the features of one batch to the builder; returns its losses ``(B,)``.

        Args:
            ids: of the examples; running numbers if not given.
            index: position of the batch, for the random state.

        Raises:
            LossError, BodyError, UnsupportedUseError, LayoutError: as ``Capture.featurize`` does.
        """
        one = self.tapped.forward(batch, self.loss_fn, ids, index, reduced=self.reduced)
        losses, labels, self.told, steps = one.losses.detach(), one.labels, one.told, one.steps
        size, first = len(losses), not self.usage.used
        sharding, company = self.tapped.sharding, self.tapped.sharding.company
        sharding.same_batch(batch, size, self.tapped.batch_dim)
        self.usage.add(one.usage)
        if first and size > 1 and self.told == "followed" and self.verifying:
            self.usage.check(self.tapped.model, self.tapped.targets, last=False)
        given = list(ids) if ids is not None else list(range(builder.count, builder.count + size))
        buffer = builder.reserve(size, one.steps)
        seen = self.ledger.add(one.uses, self.told)
        apart = buffer.dim() == 3 and diagnosis.may_be_one_by_one(one.uses, self.told, size, steps)
        one.backward(SketchRecorder(self.sketching, buffer, wait=not one.hooked))
        del one  # and with it what the forward pass computed from parameters
        sharding.add_up(buffer, self.sketching.blocks)
        session.check_features(buffer, ids)
        if apart:
            diagnosis.refuse_one_by_one(buffer)
        if first and steps == 1 and self.verifying and company.alone:
            self._look_for_a_loop(labels[0], batch, index)
        if company.any(size > 1 and self.wants_verification(index)):
            again = Verification(self.tapped, self.sketching, batch, self.loss_fn, index, self.reduced)
            again.check(buffer, given, losses)
            self.checked.add(self.told)
            self.ledger.add_verified(seen)
        company.compare()
        values = losses.to("cpu", torch.float32)
        builder.commit(given, values, labels, self.sketching.lengths(buffer) if buffer.dim() == 3 else None)
        return values

    def _look_for_a_loop(self, body: str, batch: Any, index: int) -> None:
        model = self.tapped.model
        session.begin_pass(model, self.tapped.seed, index)  # it takes hooks off: before the ones that count entries
        with session.watched(model):
            warn_if_the_loop_is_elsewhere(model, body, lambda: self.loss_fn(model, batch))

    def wants_verification(self, index: int) -> bool:
        """Whether a batch is to be verified: one for each way in which owners became known, and then a batch now and
        then, by seed and position."""
        picked = random.Random(f"{self.tapped.seed}, batch {index}").random() < VERIFIED_SHARE
        return self.verifying and (not self.checked.covers(self.told) or picked)
