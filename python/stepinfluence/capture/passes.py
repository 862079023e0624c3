"""Forward passes of a batch in which every use of a body parameter is tapped, and backward passes into a sink."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.capture import diagnosis, session
from stepinfluence.capture.body.batches import infer_batch_size, leaves, settled_size
from stepinfluence.capture.body.sources import ModelTensors
from stepinfluence.capture.body.steps import StepTracker
from stepinfluence.capture.body.targets import Target
from stepinfluence.capture.found import find, how_told
from stepinfluence.capture.owners.rows import Told, Use
from stepinfluence.capture.sharded.layout import Sharding
from stepinfluence.capture.uses.interceptor import Interceptor
from stepinfluence.capture.uses.refusals import constants_only
from stepinfluence.capture.uses.row_by_row import per_row
from stepinfluence.capture.uses.rules import RULES, expand_to_batch
from stepinfluence.capture.uses.sinks import GradientSink
from stepinfluence.capture.uses.tapping import Tapping, nested
from stepinfluence.capture.uses.usage import Usage
from stepinfluence.errors import LayoutError, UnsupportedUseError


@dataclass(frozen=True)
class TappedPass:
    """One forward pass of a batch. It holds the graph behind the losses: let go of it when it is done with.

    Attributes:
        losses: of the examples, ``(B,)``.
        told: how the owners of rows become known.
        steps: number of loop steps.
        labels: the body module of each step.
        hooked: whether hooks of the model's own may see gradients on their way back, and so write to them.
    """

    losses: Tensor
    told: Told
    steps: int
    labels: list[str]
    hooked: bool
    _interceptor: Interceptor

    @property
    def uses(self) -> Sequence[Use]:
        """All uses of body parameters."""
        return self._interceptor.uses

    @property
    def usage(self) -> Usage:
        """Which body parameters were used, and how."""
        return self._interceptor.usage

    def backward(self, sink: GradientSink, weights: Tensor | None = None) -> bool:
        """Hand the gradients of the losses at all uses to a sink; the graph is gone afterwards.

        Args:
            weights: of the losses, ``(B,)``; all one if not given.

        Returns:
            Whether some gradients were of reduced precision.

        Raises:
            LossError, LayoutError, UnsupportedUseError: the owners of rows cannot be found.
        """
        to_find = self.told == "found" and not self._interceptor.shared.found
        if to_find and weights is None:
            find(self._interceptor, self.losses, sink)
            return self._interceptor.shared.coarse
        if to_find:
            find(self._interceptor, self.losses)
        ones = torch.ones_like(self.losses) if weights is None else weights
        self._interceptor.backward(self.losses, ones, sink, keep=False)
        return self._interceptor.shared.coarse


class TappedModel:
    """A model whose forward passes can be tapped; it is not changed.

    Args:
        model, targets, steps: the model, its body's parameters, and what counts loop steps.
        outside, batch_dim, seed: as for :func:`~stepinfluence.attach`.
        sharding: how the model is spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        steps: StepTracker,
        *,
        outside: str,
        batch_dim: int,
        seed: int,
        sharding: Sharding,
    ) -> None:
        self.sharding, self.batch_dim = sharding, batch_dim
        self.model, self.targets, self.steps, self.seed = model, list(targets), steps, seed
        # One anchor for all passes: a tensor that was kept from an earlier one is told by reaching it.
        anchor = torch.zeros((), device=self.targets[0].parameter.device, requires_grad=True)
        self._tapping = Tapping(
            tensors=ModelTensors(model, self.targets),
            steps=steps,
            rules=RULES,
            expand=expand_to_batch,
            otherwise=per_row,
            anchor=anchor,
            outside=outside,
            batch_dim=batch_dim,
        )
        self._doubt = True

    def forward(
        self,
        batch: Any,
        loss_fn: session.LossFn,
        ids: Sequence[Hashable] | None,
        index: int,
        *,
        reduced: bool = False,
    ) -> TappedPass:
        """Run a batch; within :func:`~stepinfluence.capture.session.isolated`.

        Args:
            batch, loss_fn, ids: as for ``Capture.featurize``.
            index: position of the batch, for the random state.
            reduced: take one number that is repeated for the loss of the whole batch.

        Raises:
            LossError, BodyError, UnsupportedUseError, LayoutError: as ``Capture.featurize`` does.
        """
        if any(isinstance(t, Tensor) and t.is_nested for t in leaves(batch)):
            raise nested("in the batch")
        size = infer_batch_size(batch, self._tapping.batch_dim)
        if size is None:  # nothing in the batch tells, only the losses do
            size = len(session.check_losses(self.plain(batch, loss_fn, index), None, ids))
        losses, interceptor = self._run(batch, loss_fn, ids, index, size)
        try:
            told = how_told(interceptor, losses, reduced=reduced)
            if told == "found" and not self.sharding.company.alone:
                raise self._cannot_be_found(interceptor)
            if told == "found" and interceptor.owners.doubted:
                find(interceptor, losses)
        except LayoutError:
            if not interceptor.owners.doubted:
                raise
            # Tensors made without data had the batch's size by chance: taken for constants from now on.
            self._doubt = False
            losses, interceptor = self._run(batch, loss_fn, ids, index, size)
            told = how_told(interceptor, losses, reduced=reduced)
        hooked = interceptor.hooked or any(m._backward_hooks or m._backward_pre_hooks for m in self.model.modules())
        return TappedPass(losses, told, self.steps.count, list(self.steps.labels), hooked, interceptor)

    def _cannot_be_found(self, interceptor: Interceptor) -> UnsupportedUseError:
        calls = ", ".join(sorted(interceptor.owners.follower.calls)) or "an operation that is not known"
        return UnsupportedUseError(
            f"model: the examples of a batch cannot be followed through {calls}, and finding them takes backward "
            "passes of their own, which the processes of a sharded model do not run at the same time; rewrite it with "
            "torch functions, or do not shard the model"
        )

    def training_pass(self, size: int, inputs: Sequence[Tensor]) -> Interceptor:
        """The function mode of a training step on ``size`` examples: its forward pass is tapped, and parameters take
        part in autograd as well."""
        return Interceptor(self._tapping, size, inputs, doubt=self._doubt, trains=True)

    def plain(self, batch: Any, loss_fn: session.LossFn, index: int) -> Tensor:
        """The losses of a batch without tapping anything."""
        session.begin_pass(self.model, self.seed, index)
        with session.watched(self.model):
            return loss_fn(self.model, batch)

    def _run(
        self, batch: Any, loss_fn: session.LossFn, ids: Sequence[Hashable] | None, index: int, size: int
    ) -> tuple[Tensor, Interceptor]:
        self.steps.reset()
        inputs = [t for t in leaves(batch) if isinstance(t, Tensor)]
        interceptor = Interceptor(self._tapping, size, inputs, doubt=self._doubt)
        session.begin_pass(self.model, self.seed, index)
        began = diagnosis.now()
        with self.steps.watching(), interceptor, session.watched(self.model, interceptor):
            losses = loss_fn(self.model, batch)
        if (settled := settled_size(batch, self.batch_dim, losses)) not in (None, size):
            return self._run(batch, loss_fn, ids, index, settled)
        if self.steps.count == 0:
            raise diagnosis.never_entered(
                self.model, lambda: self._count_steps(batch, loss_fn, index), training=self.model.training
            )
        losses = session.check_losses(losses, size, ids)
        if (source := interceptor.source(losses)) is not None:
            raise constants_only(source.targets[0].name)
        self._check_uses(losses, began)
        return losses, interceptor

    def _count_steps(self, batch: Any, loss_fn: session.LossFn, index: int) -> int:
        session.begin_pass(self.model, self.seed, index)
        with self.steps.watching(), session.watched(self.model):
            loss_fn(self.model, batch)
        return self.steps.count

    def _check_uses(self, losses: Tensor, began: int) -> None:
        anchor = self._tapping.anchor
        leaves_of = {id(leaf): t.name for t in self.targets for leaf in (t.parameter, t.held)}
        names = leaves_of | {id(anchor): "model"}
        for name, user in diagnosis.reaching(losses, names):
            if self.steps.elsewhere and name != "model":  # autograd counts in each thread for itself
                raise UnsupportedUseError(
                    f"{name}: the body was run in another thread ({self.steps.elsewhere}), where what is done with it "
                    "cannot be seen; run the loop in the thread that featurizes"
                )
            diagnosis.refuse_earlier(name, user, began)
            if name == "model":  # a tap of this pass, as they all should be
                continue
            raise UnsupportedUseError(
                f"{name}: reaches the loss through {user.name()} in a way that cannot be seen from Python "
                "(a custom autograd function or a scripted part); rewrite that use with torch functions"
            )
