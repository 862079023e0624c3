"""``attach``: sketches of per-example, per-step gradients of any looped model, in one forward and backward pass."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdi_kernels import HASH_FORMAT, CountSketch, HashFamily, Route
from stepinfluence.attribution.features import FeatureBuilder, Features, FeatureSpace, weights_digest
from stepinfluence.attribution.preconditioners import Preconditioner, prepare
from stepinfluence.capture import diagnosis, session
from stepinfluence.capture.batches import infer_batch_size, leaves
from stepinfluence.capture.found import owners_of_rows, run_backward
from stepinfluence.capture.hooks import read_factors, with_factors
from stepinfluence.capture.interceptor import Interceptor, nested
from stepinfluence.capture.recorder import SketchRecorder
from stepinfluence.capture.steps import Loop, StepTracker
from stepinfluence.capture.targets import (
    Body,
    Layout,
    body_parameters,
    find_body,
    make_targets,
    single_device,
    unwrap,
)
from stepinfluence.capture.told import Ledger, Uses
from stepinfluence.capture.usage import Usage
from stepinfluence.capture.uses import RULES
from stepinfluence.capture.verified import Checked, Memory
from stepinfluence.errors import LayoutError, UnsupportedUseError

VERIFIED_SHARE = 1 / 64
"""Share of the batches after the first that are verified again, picked by seed and position."""


class Capture(session.LoaderCapture):
    """Featurizes batches of a looped model; made by :func:`attach`. The model is not changed, in or after use."""

    def __init__(
        self,
        model: nn.Module,
        *,
        body: Body,
        sketch_size: int | Mapping[str, int] = 2048,
        hashing: HashFamily = "balanced",
        seed: int = 0,
        loop: Loop = "entries",
        outside: Literal["error", "ignore"] = "error",
        batch_dim: int = 0,
        training: bool = False,
        verify: bool = True,
        route: Route = "auto",
        preconditioner: Preconditioner | None = None,
        layout: Layout = "concat",
    ) -> None:
        if outside not in ("error", "ignore"):
            raise ValueError(f"outside: got {outside!r}; use 'error' or 'ignore'")
        self.model = unwrap(model)
        self.body = find_body(self.model, body)
        parameters = body_parameters(self.model, self.body)
        self.device = single_device(parameters)
        self.targets = make_targets(parameters, sketch_size=sketch_size, hashing=hashing, seed=seed, layout=layout)
        self.hashing: HashFamily = hashing
        self.layout: Layout = layout
        self.seed = seed
        self.batch_dim = batch_dim
        self.training = training
        self.verify = verify
        self._steps = StepTracker(self.model, self.body, loop)
        self._recorder = SketchRecorder(self.targets, route, layout)
        self._outside = outside
        self._interceptor = self._make_interceptor()
        self._tables = hashlib.blake2b(
            "".join(t.sketch.fingerprint for t in self.targets).encode(), digest_size=16
        ).hexdigest()
        double = any(t.parameter.dtype == torch.float64 for t in self.targets)
        self._dtype = torch.float64 if double else torch.float32
        self.precondition(preconditioner)
        self._probe = self._probe_columns()
        self._memory = Memory()
        self._checked = Checked(None)
        self._verifying = verify
        self._usage = Usage()
        self._ledger = Ledger()
        self._doubt = True
        self.reduced_loss = False
        """Whether losses may be one number of the whole batch, repeated (as the published package takes it): rows then
        belong to whom they were followed from, which nothing can prove."""
        self.owners: Literal["followed", "found"] = "followed"
        """How the owners of the last batch's rows were known: followed through the forward pass, or found by
        gradients."""

    def _make_interceptor(self) -> Interceptor:
        return Interceptor(
            self.model,
            self.targets,
            self._steps,
            self._recorder,
            outside=self._outside,
            rules=RULES,
            batch_dim=self.batch_dim,
        )

    def recording_to(self, recorder: SketchRecorder) -> Capture:
        """A capture of the same parameters in the same loop (step marks are shared) that hands gradients to another
        recorder."""
        twin = copy.copy(self)
        twin._recorder = recorder
        twin._interceptor = twin._make_interceptor()
        return twin

    @property
    def width(self) -> int:
        """D, the length of a feature row."""
        return self._recorder.width

    @property
    def step_log(self) -> StepTracker:
        """The loop steps of the last forward pass."""
        return self._steps

    def space(self) -> FeatureSpace:
        """What the columns of this capture's features mean, at the model's present weights and hooks on them.

        Raises:
            UnsupportedUseError: a body parameter has a gradient hook that cannot be applied to single examples.
        """
        factors = read_factors(self._body_parameters())
        roots = with_factors(self._roots, factors, self._dtype, self.device)
        self._recorder.precondition(roots)
        metric = weights_digest([t for root in roots.values() for t in root.tensors]) if factors else self._metric
        weights = weights_digest([t.parameter for t in self.targets])
        return FeatureSpace("sketch", tuple(self._recorder.blocks), self._tables, weights, metric)

    def _body_parameters(self) -> dict[str, nn.Parameter]:
        return {t.name: t.parameter for t in self.targets}

    @property
    def preconditioner(self) -> Preconditioner | None:
        """The metric that features are taken under; :meth:`precondition` changes it."""
        return self._preconditioner

    def precondition(self, preconditioner: Preconditioner | None) -> None:
        """Featurize under another metric from now on; None for the plain gradient.

        Raises:
            TypeError, ValueError: as for :func:`attach`.
        """
        roots, metric = prepare(preconditioner, self._body_parameters(), self._dtype, self.device)
        self._recorder.precondition(roots)
        self._roots, self._metric, self._preconditioner = roots, metric, preconditioner

    def step(self, t: int) -> AbstractContextManager[None]:
        """Mark a part of the model's forward pass as loop step ``t`` (0-based), with ``loop="manual"``."""
        return self._steps.manual_step(t)

    def explain(self) -> str:
        """A table of the body's parameters: shape, sketch, share of a feature row."""
        rows = [f"{'parameter':<44} {'shape':<16} {'columns':<16} sketch"]
        for target, block in zip(self.targets, self._recorder.blocks, strict=True):
            lossless = isinstance(target.sketch, CountSketch) and self.hashing != "iid"
            note = ", lossless" if lossless and target.sketch.m >= target.parameter.numel() else ""
            shape, columns = str(tuple(target.parameter.shape)), f"{block.start}:{block.stop}"
            rows.append(f"{target.name:<44} {shape:<16} {columns:<16} {target.sketch!r}{note}")
        item = torch.finfo(self._dtype).bits // 8
        rows.append(
            f"{len(self.targets)} parameters, {self.hashing} hashing ({HASH_FORMAT}), {self.layout} layout; "
            f"a feature row has {self.width} columns = {self.width * item / 1024:.1f} KiB per loop step"
        )
        return "\n".join(rows)

    def uses(self) -> Uses:
        """The uses of parameters in the last run: in how many steps, in how many batches the owners of their rows were
        followed through the forward pass or found by gradients, and how many were verified. Printed, a table."""
        return self._ledger.table()

    def __repr__(self) -> str:
        return (
            f"Capture({type(self.model).__name__}, {len(self.targets)} parameters, width {self.width}; "
            f"{self._ledger.summary()})"
        )

    def featurize(
        self,
        loader: Iterable[Any],
        loss_fn: session.LossFn,
        *,
        per_step: bool = True,
        ids: session.IdsOf | None = None,
        progress: bool = True,
        first_batch: int = 0,
        verify: bool | None = None,
        on_error: session.OnError | None = None,
    ) -> Features:
        """Sketch the gradients of every example of a loader (paper, Algorithm 1).

        Args:
            loader: gives batches; anything ``loss_fn`` takes.
            loss_fn: ``loss_fn(model, batch) -> (B,)``, one loss per example, not reduced over the batch.
            per_step: ``(N, steps, D)`` with one row per loop step (queries), or ``(N, D)`` summed over steps (training
                side: ``steps`` times smaller).
            ids: ``ids(batch) -> sequence`` of one hashable per example; running numbers if not given.
            progress: show a progress bar on work of over two seconds.
            first_batch: number of the loader's first batch, where the loader is a part of a larger one: the random
                state that a batch starts from goes by it, so that a part is featurized as it would be in the whole.
            verify: False: not in this call. True: in this call, whatever was verified before. None: as given to
                :func:`attach`, and what was verified in an earlier call is not verified again, as long as the loss
                function is the same object and weights, metric and mode are the same. What a loss function closes over
                is not looked at.
            on_error: called with the error of a batch that failed; unless it raises, the batch is left out. If not
                given, the error is raised.

        Returns:
            :class:`Features` on the body's device, float32 (float64 for a float64 body).

        Raises:
            LossError: the loss has a wrong shape, no gradient, or is not finite (names the examples).
            BodyError: a body parameter is never used, or used outside the loop, or no step was entered.
            UnsupportedUseError: a use whose gradient cannot be captured (names parameter and operation).
            LayoutError: the examples of a batch cannot be told apart or influence one another.
        """
        diagnosis.check_parameters(self.model, self._body_parameters())
        space = self.space()
        self._begin(loss_fn, space, verify)
        features = self._featurize_loader(
            loader,
            loss_fn,
            space=space,
            per_step=per_step,
            ids=ids,
            progress=progress,
            description="featurize",
            first_batch=first_batch,
            on_error=on_error,
        )
        if len(features) and self._verifying:
            self._usage.check(self.model, self.targets, last=True)
        return features

    # ------------------------------------------------------------------------------------------------------------

    def _begin(self, loss_fn: session.LossFn, space: FeatureSpace, verify: bool | None = None) -> None:
        """Batches with this loss at these weights follow. Another loss, or other weights, may mix examples where the
        last did not; the weights outside the body are known by where they lie and how often they were written."""
        owned = {id(t.parameter) for t in self.targets}
        others = tuple((p.data_ptr(), p._version) for p in self.model.parameters() if id(p) not in owned)
        state = (space, others, self.training, self.batch_dim)
        self._checked = self._memory.recall(loss_fn, state, anew=verify is True)
        self._verifying = self.verify if verify is None else verify
        self._usage = Usage()
        self._ledger = Ledger()

    def _featurize_batch(
        self,
        builder: FeatureBuilder,
        batch: Any,
        loss_fn: session.LossFn,
        ids: Sequence[Hashable] | None,
        index: int,
    ) -> Tensor:
        losses = self._forward(batch, loss_fn, ids, index)
        size, steps = len(losses), self._steps.count
        first = not self._usage.used
        self._usage.add(self._interceptor.usage)
        if first and size > 1 and self.owners == "followed" and self._verifying:
            self._usage.check(self.model, self.targets, last=False)
        given = ids if ids is not None else range(builder.count, builder.count + size)
        buffer = builder.reserve(size, steps)
        told = self._ledger.add(self._interceptor.uses, self.owners)
        self._backward(losses, buffer)
        session.check_features(buffer, ids)
        # Once for each way in which owners became known, and then a batch now and then.
        if self._verifying and size > 1 and (not self._checked.covers(self.owners) or self._is_picked(index)):
            self._verify(batch, loss_fn, index, buffer, given, losses.detach())
            self._checked.add(self.owners)
            self._ledger.add_verified(told)
        values = losses.detach().to("cpu", torch.float32)
        builder.commit(list(given), values, self._steps.labels, self._lengths(buffer) if buffer.dim() == 3 else None)
        return values

    def _is_picked(self, index: int) -> bool:
        """Whether a batch is one of those that are verified again."""
        return random.Random(f"{self.seed}, batch {index}").random() < VERIFIED_SHARE

    def _forward(self, batch: Any, loss_fn: session.LossFn, ids: Sequence[Hashable] | None, index: int) -> Tensor:
        """The losses of a batch, with every use of a parameter tapped and its rows' owners known."""
        if any(isinstance(t, Tensor) and t.is_nested for t in leaves(batch)):
            raise nested("in the batch")
        expected = infer_batch_size(batch, self.batch_dim)
        if expected is None:  # nothing in the batch tells, only the losses do
            expected = len(session.check_losses(self._plain(batch, loss_fn, index), None, ids))
        losses = self._run(batch, loss_fn, ids, index, expected)
        self._check_uses(losses)
        try:
            self.owners = owners_of_rows(self._interceptor, losses, reduced=self.reduced_loss)
        except LayoutError:
            if not self._interceptor.doubted:
                raise
            # Tensors made without data had the batch's size by chance: taken for constants from now on.
            self._doubt = False
            losses = self._run(batch, loss_fn, ids, index, expected)
            self.owners = owners_of_rows(self._interceptor, losses, reduced=self.reduced_loss)
        return losses

    def _run(
        self, batch: Any, loss_fn: session.LossFn, ids: Sequence[Hashable] | None, index: int, size: int
    ) -> Tensor:
        self._steps.reset()
        inputs = [t for t in leaves(batch) if isinstance(t, Tensor)]
        self._interceptor.reset(size, inputs, doubt=self._doubt)
        session.begin_pass(self.model, self.seed, index)
        self._began = diagnosis.now()
        with self._steps.watching(), self._interceptor, session.watched(self.model):
            losses = loss_fn(self.model, batch)
        if self._steps.count == 0:
            raise diagnosis.never_entered(
                self.model, lambda: self._count_steps(batch, loss_fn, index), training=self.training
            )
        return session.check_losses(losses, size, ids)

    def _plain(self, batch: Any, loss_fn: session.LossFn, index: int) -> Tensor:
        """The losses of a batch without capturing anything."""
        session.begin_pass(self.model, self.seed, index)
        with session.watched(self.model):
            return loss_fn(self.model, batch)

    def _count_steps(self, batch: Any, loss_fn: session.LossFn, index: int) -> int:
        session.begin_pass(self.model, self.seed, index)
        with self._steps.watching(), session.watched(self.model):
            loss_fn(self.model, batch)
        return self._steps.count

    def _backward(self, losses: Tensor, buffer: Tensor, weights: Tensor | None = None) -> bool:
        """Hand all gradients of the losses to the recorder; says whether some were of reduced precision."""
        self._recorder.start(buffer)
        self._interceptor.sink = self._recorder
        run_backward(self._interceptor, losses, torch.ones_like(losses) if weights is None else weights, keep=False)
        return self._interceptor.shared.coarse

    def _check_uses(self, losses: Tensor) -> None:
        anchor = self._interceptor.anchor
        names = {id(t.parameter): t.name for t in self.targets} | {id(anchor): "model"}
        for name, user in diagnosis.reaching(losses, names):
            diagnosis.refuse_earlier(name, user, self._began)
            if name == "model":  # a tap of this pass, as they all should be
                continue
            raise UnsupportedUseError(
                f"{name}: reaches the loss through {user.name()} in a way that cannot be seen from Python "
                "(a custom autograd function or a scripted part); rewrite that use with torch functions"
            )

    def _verify(
        self,
        batch: Any,
        loss_fn: session.LossFn,
        index: int,
        features: Tensor,
        ids: Sequence[Hashable],
        before: Tensor,
    ) -> None:
        """Scale every example's loss by its own power of two: its features must scale with it, and with no other.

        This is what "per-example" means, so it finds a mistaken example dimension as well as a model in which
        examples of a batch influence one another.
        """
        size = len(features)
        generator = torch.Generator().manual_seed(size)
        # Eight different weights, far apart, and exact products in every floating dtype.
        exponents = torch.randperm(size, generator=generator) % 8 * (7 // (min(size, 8) - 1))
        losses = self._forward(batch, loss_fn, ids, index)
        if not torch.allclose(losses.detach(), before, rtol=1e-2, atol=1e-3 * float(before.abs().amax())):
            raise diagnosis.other_losses(lambda: self._plain(batch, loss_fn, index))
        weights = (2.0**exponents).to(losses)
        scaled = torch.zeros_like(features)
        # Exact but for the rounding of sums that are not taken in the same order twice.
        tolerance = 1e-2 if self._backward(losses, scaled, weights) else 1e-4
        factor = weights.to(features.dtype).view(-1, *(1,) * (features.dim() - 1))
        for block in {b.start: b for b in self._recorder.blocks}.values():  # in the sum layout, all in one
            expected = features[..., block.start : block.stop] * factor
            error = (scaled[..., block.start : block.stop] - expected).flatten(1).norm(dim=1)
            size_of = expected.flatten(1).norm(dim=1)
            bad = (~(error <= tolerance * size_of + 1e-6 * size_of.max())).nonzero().flatten()  # a NaN is bad
            if len(bad):
                columns = slice(block.start, block.stop)
                finite = scaled[..., columns].flatten(1).isfinite().all(1)
                if not bool(finite.all()):
                    example = repr(ids[int((~finite).nonzero()[0])])
                    raise diagnosis.not_finite_again(block.name, example, float(weights.max()))

                def again(factor: float, columns: slice = columns) -> Tensor:
                    return self._uniformly_scaled(batch, loss_fn, index, features, factor)[..., columns]

                half = any(t.parameter.dtype == torch.float16 for t in self.targets) or losses.dtype == torch.float16
                one = features[..., columns]
                raise diagnosis.not_per_example(block.name, repr(ids[int(bad[0])]), again, one, tolerance, half=half)

    def _uniformly_scaled(
        self, batch: Any, loss_fn: session.LossFn, index: int, features: Tensor, factor: float
    ) -> Tensor:
        """The features of a batch once more, with every loss multiplied by the same factor."""
        losses = self._forward(batch, loss_fn, None, index)
        scaled = torch.zeros_like(features)
        self._backward(losses, scaled, torch.full_like(losses, factor))
        return scaled

    def _probe_columns(self) -> Tensor:
        """A few columns of each block that mostly hold something: a cheap first look at whether a step's gradient is
        zero."""
        columns = []
        for target, block in zip(self.targets, self._recorder.blocks, strict=True):
            sketch = target.sketch
            side = sketch.bucket if hasattr(sketch, "bucket") else range(sketch.m)
            columns += [block.start + int(side[k]) for k in range(min(8, len(side)))]
        return torch.tensor(sorted(set(columns)), device=self.device)

    def _lengths(self, buffer: Tensor) -> Tensor:
        active = (buffer[:, :, self._probe] != 0).any(-1)
        # Dead units or tokens that do not occur leave the probed columns empty: then all columns decide.
        active[~active] = (buffer[~active] != 0).any(-1)
        last = torch.arange(1, buffer.shape[1] + 1, device=buffer.device) * active
        return last.amax(1).cpu() if buffer.shape[1] else torch.zeros(len(buffer), dtype=torch.int64)


def attach(
    model: nn.Module,
    *,
    body: Body,
    sketch_size: int | Mapping[str, int] = 2048,
    hashing: HashFamily = "balanced",
    seed: int = 0,
    loop: Loop = "entries",
    outside: Literal["error", "ignore"] = "error",
    batch_dim: int = 0,
    training: bool = False,
    verify: bool = True,
    route: Route = "auto",
    preconditioner: Preconditioner | None = None,
    layout: Layout = "concat",
) -> Capture:
    """Make a capture for the loop body of a model.

    Args:
        model: any PyTorch module; DDP and ``torch.compile`` wrappers are looked through.
        body: the module(s) that the loop applies at every step, or their names. Their trainable parameters are what
            influence is measured on; a step is one entry into a body module, however often a layer is used in it.
        sketch_size: m, buckets per parameter (paper: 2048), or a mapping from parameter name to m, as
            :func:`~stepinfluence.allocate_sizes` makes them. A number is the most that a vector gets under balanced
            hashing: a shorter one is kept without loss in as many columns as it has entries.
        hashing: ``"balanced"`` (default, lower variance), ``"iid"`` (the paper's), or ``"block"`` (what
            ``route="shear"`` is for).
        seed: of the hash tables; features are comparable only for equal seeds.
        loop: how steps are counted: ``"entries"``, ``"timeline"`` or ``"manual"`` (see
            :class:`~stepinfluence.capture.steps.StepTracker`).
        outside: what to do with uses of body parameters outside the loop: ``"error"``, or ``"ignore"`` to leave them
            out (then the steps add up to the gradient through the loop only).
        batch_dim: the dimension that holds the examples in the batch's tensors and in the model's activations.
        training: run the model in training mode (dropout on, with a random state fixed per batch) instead of eval mode.
        verify: check on real gradients that examples are told apart (one more pass on the first batch; again with
            another loss function, other weights, or examples told apart in a new way), and that every body parameter is
            used.
        route: kernel route, see :func:`sdi_kernels.sketch_linear_grads`.
        preconditioner: an optimizer's metric, as a root by parameter name: features are those of ``sqrt(P) * gradient``
            (:func:`stepinfluence.attribution.preconditioners.from_optimizer`, docs/optimizers.md).
        layout: ``"concat"`` (the paper's: columns of its own for each parameter), or ``"sum"``: all parameters'
            independent sketches are added into the same ``sketch_size`` columns, also unbiased (docs/store.md).

    Raises:
        BodyError: ``body`` is not part of the model or has no trainable parameter.
        ValueError, TypeError: an option is not one of those above, or the preconditioner does not fit.
    """
    return Capture(
        model,
        body=body,
        sketch_size=sketch_size,
        hashing=hashing,
        seed=seed,
        loop=loop,
        outside=outside,
        batch_dim=batch_dim,
        training=training,
        verify=verify,
        route=route,
        preconditioner=preconditioner,
        layout=layout,
    )
