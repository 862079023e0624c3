"""Features out of an ordinary training step: its backward pass gives gradients *and* sketches.

In a run of its own (:meth:`Capture.featurize`) parameters are detached and weight gradients are never formed. Here
parameters train as usual; at every use the gradient that passes by is sketched, too. The gradient at example ``b``'s
rows is that of its loss times the weight ``w_b`` that the training loss gives to it (1 / B for a mean, times a scaler's
factor, ...). The weights are read where the backward pass comes through the losses, and divided out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from stepinfluence.attribution.features import FeatureBuilder, Features
from stepinfluence.capture import session
from stepinfluence.capture.body.batches import fingerprints, infer_batch_size, leaves
from stepinfluence.capture.body.hooks import Hooks
from stepinfluence.capture.body.sources import Piece, Source
from stepinfluence.capture.body.taps import has_tap
from stepinfluence.capture.body.targets import Target
from stepinfluence.capture.body.threads import one_thread
from stepinfluence.capture.found import followed_to
from stepinfluence.capture.owners.rows import Use
from stepinfluence.capture.recording.recorder import SketchRecorder
from stepinfluence.capture.recording.sketching import Sketching
from stepinfluence.capture.sketched_run import VERIFIED_SHARE
from stepinfluence.errors import BodyError, LayoutError, LossError, StepInfluenceError, UnsupportedUseError

if TYPE_CHECKING:
    from stepinfluence.capture.sketched import Capture

OF_ALL = 1e-2
"""The share of all parameters' gradients that counts for each of them, see :func:`first_beyond`."""

ONE_LOSS = "; return one loss per example (B,), pass it through inline.losses(...), and reduce only its result"


class _Recorder(SketchRecorder):
    """A recorder in a backward pass that also gives parameters their gradients, through the hooks on them."""

    def __init__(self, capture: Capture, buffer: Tensor) -> None:
        super().__init__(capture.sketching, buffer)
        self._hooks = Hooks([(t.name, t.parameter) for t in capture.targets])

    def dense(self, source: Source, use: Use, grads: Tensor, first: int) -> None:
        # Of a tensor computed from parameters, gradients are taken back to these: that is not what hooks are for.
        with self._hooks.silenced() if source.piece is None else nullcontext():
            super().dense(source, use, grads, first)


class Inline:
    """One training step that is featurized on the way; made by :meth:`Capture.inline`, used as a context.

    Attributes:
        weights: ``(B,)``: what the training loss weighted each example's loss with; None before the backward pass.
    """

    def __init__(
        self,
        capture: Capture,
        batch: Any,
        ids: Sequence[Hashable] | None,
        index: int,
        *,
        per_step: bool,
        weighted: bool,
        verify: bool,
    ) -> None:
        self._capture, self._batch, self._ids, self._per_step = capture, batch, ids, per_step
        self._weighted_rows = weighted
        picked = random.Random(f"{capture.seed}, inline {index}").random() < VERIFIED_SHARE
        self._verified = verify and (index == 0 or picked)
        self._size = infer_batch_size(batch, capture.batch_dim)
        if self._size is None:
            raise LayoutError(
                "inline: the tensors of the batch have no size in common, so that its examples cannot be told; pass "
                "those that have a row for each example"
            )
        inputs = [t for t in leaves(batch) if isinstance(t, Tensor)]
        self._interceptor = capture.tapped.training_pass(self._size, inputs)
        self._interceptor.backward_call = self._backward
        self._stack = ExitStack()
        self._losses: Tensor | None = None
        self._gradients: list[tuple[Target, Tensor]] = []
        self._problem: StepInfluenceError | None = None
        self._features: Features | None = None
        self.weights: Tensor | None = None

    def __enter__(self) -> Inline:
        capture = self._capture
        with ExitStack() as opened:
            opened.enter_context(one_thread(capture.model))
            self._space = capture.space()  # reads the hooks on parameters, before there is one of ours
            self._builder = FeatureBuilder(
                capture.width, capture.dtype, capture.device, per_step=self._per_step, expected=self._size or 0
            )
            capture.tapped.steps.reset()
            opened.enter_context(torch.compiler.set_stance("force_eager"))
            opened.enter_context(self._interceptor)
            self._watching = opened.enter_context(ExitStack())
            self._watching.enter_context(capture.tapped.steps.watching())
            self._stack = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        missing = self._losses is None
        # The graph's taps hold the interceptor: as long as it, or this, held the losses, the graph of every step would
        # stay, since the way from a tensor to its graph is one that Python's collector does not see.
        self._interceptor.backward_call, self._losses, self._gradients = None, None, []
        if kind is None and missing:
            raise LossError("inline: no losses were given to inline.losses(...)" + ONE_LOSS)

    def losses(self, losses: Tensor) -> Tensor:
        """Say which the examples' losses are, before they are reduced.

        Args:
            losses: ``(B,)``, one per example, not reduced.

        Returns:
            The same tensor: reduce it, weight it, and call ``backward()`` on the result, within the context.

        Raises:
            LossError: another shape, no gradient, or not finite (names the examples).
            BodyError: the forward pass did not enter the loop.
            UnsupportedUseError: the model has hooks that see gradients (those on parameters aside).
            LayoutError: whose the rows are cannot be followed through the forward pass; :meth:`Capture.featurize` can
                find it out, by further passes.
        """
        tapped, interceptor = self._capture.tapped, self._interceptor
        self._watching.close()
        losses = session.check_losses(losses, self._size, self._ids)
        if tapped.steps.count == 0:
            raise BodyError(
                "body: the loop was never entered between the beginning of inline(...) and inline.losses(...)"
            )
        modules = self._capture.model.modules()
        if interceptor.hooked or any(m._backward_hooks or m._backward_pre_hooks for m in modules):
            raise UnsupportedUseError(
                "inline: a hook of the model's sees gradients on their way back; whether it mixes examples, clips or "
                "rounds cannot be checked within a training step; take it off, or use capture.featurize, which checks"
            )
        interceptor.shared.size = len(losses)
        if len(losses) > 1 and not followed_to(interceptor, losses):
            raise LayoutError(
                "inline: whose the rows of this model's activations are cannot be followed through its forward pass, "
                "and a training step has no further passes to find it out; use capture.featurize"
            )
        self._losses = losses
        return losses

    @property
    def features(self) -> Features:
        """The features of the batch's examples at the weights that the step began with.

        Raises:
            LossError: there was no backward pass within the context, some example's loss had no part in it, or
                gradients are not finite. Training is not disturbed by that: its gradients are as they are.
        """
        if self._problem is not None:
            raise self._problem
        if self._features is None:
            raise LossError(
                "inline: no backward pass came through the losses; call backward() within the context of inline(...)"
            )
        return self._features

    @property
    def tolerance(self) -> float:
        """How far the rows may be from adding up to the gradient, relative to the sum of their norms: rounding, which
        is larger where gradients of reduced precision were seen."""
        return 2e-2 if self._interceptor.shared.coarse else 1e-3

    # ------------------------------------------------------------------------------------------------------------

    def _backward(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The user's ``backward()``: taps hand over what passes by."""
        losses, interceptor, steps = self._losses, self._interceptor, self._capture.tapped.steps
        if losses is None:
            raise LossError("inline: backward() was called before losses were given to inline.losses(...)" + ONE_LOSS)
        self._check_roots(args[0] if args else kwargs["tensors"], losses)
        if self._features is not None or self._problem is not None:
            raise LossError("inline: a second backward pass; open a context of its own for each")
        buffer = self._builder.reserve(len(losses), steps.count)
        handles = [losses.register_hook(self._weighted)]
        if self._verified and not interceptor.usage.outside:
            handles += [self._keep_gradient(t) for t in self._capture.targets]
        try:
            with interceptor.receiving(losses, _Recorder(self._capture, buffer)), interceptor:
                result = func(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        try:
            self._finish(buffer, losses.detach())
        except StepInfluenceError as problem:
            self._problem = problem
        return result

    def _weighted(self, weights: Tensor) -> None:
        self.weights = weights.detach().clone()

    def _keep_gradient(self, target: Target) -> RemovableHandle:
        """Keep the gradient that a parameter gets, as it is before the user's hooks."""
        hooks: Any = target.parameter._backward_hooks or {}
        others = dict(hooks)
        hooks.clear()
        handle: RemovableHandle
        keep = self._gradients.append
        handle = target.parameter.register_hook(lambda gradient: keep((target, gradient.detach().to_dense())))
        hooks.update(others)  # behind it: autograd goes by the order in which they were put in
        return handle

    def _check_roots(self, roots: Any, losses: Tensor) -> None:
        """What is backpropagated reaches the body through the losses only.

        Raises:
            LossError: it also does so in another way (an auxiliary loss, a penalty on activations).
        """
        tensors = [roots] if isinstance(roots, Tensor) else list(roots)
        if has_tap(tensors, but_through=losses):
            raise LossError(
                "inline: what is backpropagated reaches the loop body beside the losses given to inline.losses(...), "
                "by an auxiliary loss or a penalty on activations, so that gradients are not those of the examples; "
                "add it to each example's loss, or backpropagate it on its own, after the context"
            )

    def _finish(self, buffer: Tensor, losses: Tensor) -> None:
        if self.weights is None:
            raise LossError("inline: the backward pass did not come through the losses given to inline.losses(...)")
        weights = self.weights.to(buffer.dtype)
        session.check_features(buffer, self._ids)
        if self._gradients:
            self._check_sum(buffer)
        if not self._weighted_rows and bool((weights == 0).any()):
            rows = ", ".join(str(k) for k in (weights == 0).nonzero().flatten()[:5].tolist())
            raise LossError(
                f"inline: the training loss weights example(s) {rows} of the batch with 0, so that nothing can be "
                "known of their gradients; leave them out of the batch, or use capture.featurize"
            )
        if not self._weighted_rows:
            buffer /= weights.view(-1, *(1,) * (buffer.dim() - 1))
        size, labels = len(losses), self._capture.tapped.steps.labels
        ids = list(self._ids) if self._ids is not None else list(range(size))
        lengths = self._capture.sketching.lengths(buffer) if self._per_step else None
        self._builder.commit(ids, losses.to("cpu", torch.float32), labels, lengths)
        if self._ids is None:
            self._builder.fingerprints += fingerprints(self._batch, size, self._capture.batch_dim)
        self._features = self._builder.finish(self._space)

    def _check_sum(self, buffer: Tensor) -> None:
        """The rows add up to the sketch of the gradients that the parameters got: nothing is missing, nothing added.

        Raises:
            LayoutError: they do not (names the parameter).
        """
        whole = sketch_of_gradients(self._capture.sketching, self._gradients, buffer)
        self._gradients = []
        rows = buffer if buffer.dim() == 2 else buffer.flatten(0, 1)
        other = first_beyond(
            self._capture.sketching, rows.sum(0) - whole, sizes(self._capture.sketching, rows), self.tolerance
        )
        if other is not None:
            raise not_whole(other)


def sketch_of_gradients(sketching: Sketching, gradients: Iterable[tuple[Target, Tensor]], like: Tensor) -> Tensor:
    """``(D,)``, of the dtype and on the device of ``like``: the sketch of what parameters have as gradients."""
    recorder = SketchRecorder(sketching, like.new_zeros(1, sketching.width))
    for target, gradient in gradients:
        rows, columns = target.matrix_shape
        piece = Piece(target, range(rows), range(columns), False, 2)
        recorder.add(piece, 0, gradient.reshape(1, rows, columns), 0)
    return recorder.buffer[0]


def sizes(sketching: Sketching, rows: Tensor) -> Tensor:
    """The sum of the norms of rows ``(B, D)``, for each range of columns."""
    return torch.stack([rows[:, g.start : g.stop].norm(dim=1).sum() for g in sketching.column_groups])


def first_beyond(sketching: Sketching, difference: Tensor, size: Tensor, tolerance: float) -> str | None:
    """The first parameter in whose columns a difference ``(D,)`` is no rounding any more.

    Args:
        size: of what was added up, see :func:`sizes`.
        tolerance: relative to that. A part of it counts for all parameters alike: of some, the gradient is zero but for
            the rounding of what cancels in it, such as that of a bias of attention's keys.
    """
    bounds = tolerance * (size + OF_ALL * size.sum())
    for group, bound in zip(sketching.column_groups, bounds.tolist(), strict=True):
        if not float(difference[group.start : group.stop].norm()) <= bound:
            return group.name
    return None


def not_whole(name: str) -> LayoutError:
    """The error for rows that do not add up to a parameter's gradient."""
    return LayoutError(
        f"{name}: the examples' gradients do not add up to the gradient that it got in this training step; something "
        "uses it in a way that cannot be seen from Python (a custom autograd function or a scripted part), or a hook "
        "changes gradients; use capture.featurize, which says what"
    )
