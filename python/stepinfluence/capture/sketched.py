"""``attach``: sketches of per-example, per-step gradients of any looped model, in one forward and backward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from torch import nn

from sdi_kernels import HASH_FORMAT, CountSketch, HashFamily, Route
from sdi_kernels.plan import ROUTES
from stepinfluence.arguments import one_of
from stepinfluence.attribution.features import Features, weights_digest
from stepinfluence.attribution.preconditioners import Preconditioner, Root
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.capture import session
from stepinfluence.capture.body.hooks import read_factors, with_factors
from stepinfluence.capture.body.steps import Loop, StepTracker
from stepinfluence.capture.body.targets import (
    Body,
    Layout,
    Target,
    body_parameters,
    check_model,
    find_body,
    make_targets,
    single_device,
    unwrap,
)
from stepinfluence.capture.body.threads import one_thread
from stepinfluence.capture.discovery import PendingCapture
from stepinfluence.capture.inline import Inline
from stepinfluence.capture.owners.rows import Told
from stepinfluence.capture.passes import TappedModel
from stepinfluence.capture.recording.sketching import Sketching
from stepinfluence.capture.sharded.layout import Sharding
from stepinfluence.capture.sketched_run import SketchedRun
from stepinfluence.capture.told import Ledger, Uses
from stepinfluence.capture.verified import Memory
from stepinfluence.shards import data_pointer


class Capture(session.LoaderCapture):
    """Featurizes batches of a looped model; made by :func:`attach`, which has the options. The model is not changed, in
    or after use.

    Attributes:
        model: unwrapped.
        targets: the body's parameters with their sketches, in the model's order.
        tapped: runs the model and hands gradients to a sink.
        sketching: what the sketches are, and which columns they fill.
        reduced_loss: whether losses may be one number of the whole batch, repeated (as the published package takes
            it): rows then belong to whom they were followed from, which nothing can prove.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        steps: StepTracker,
        sketching: Sketching,
        *,
        hashing: HashFamily,
        seed: int,
        outside: Literal["error", "ignore"],
        batch_dim: int,
        training: bool,
        verify: bool,
        preconditioner: Preconditioner | None,
        sharding: Sharding,
    ) -> None:
        self.model, self.body, self.targets = model, steps.body, list(targets)
        self.sharding = sharding
        sharding.parallel.watch(targets, sketching.layout)
        self.device = single_device({t.name: t.parameter for t in self.targets})
        self.sketching = sketching
        self.hashing: HashFamily = hashing
        self.layout: Layout = sketching.layout
        self.seed, self.batch_dim, self.training, self.verify = seed, batch_dim, training, verify
        self.tapped = TappedModel(
            model, targets, steps, outside=outside, batch_dim=batch_dim, seed=seed, sharding=sharding
        )
        double = any(t.parameter.dtype == torch.float64 for t in targets)
        self.dtype = torch.float64 if double else torch.float32
        self.reduced_loss = False
        tables = "".join(t.sketch.fingerprint for t in targets)
        self._tables = hashlib.blake2b(tables.encode(), digest_size=16).hexdigest()
        self._memory = Memory()
        self._last: SketchedRun | None = None
        self._inlined = 0
        self.precondition(preconditioner)

    @property
    def width(self) -> int:
        """D, the length of a feature row."""
        return self.sketching.width

    @property
    def step_log(self) -> StepTracker:
        """The loop steps of the last forward pass."""
        return self.tapped.steps

    @property
    def owners(self) -> Told:
        """How the owners of the last batch's rows were known: followed through the forward pass, or found by
        gradients."""
        return "followed" if self._last is None else self._last.told

    def space(self) -> FeatureSpace:
        """What the columns of this capture's features mean, at the model's present weights and hooks on them.

        Raises:
            UnsupportedUseError: a body parameter has a gradient hook that cannot be applied to single examples.
        """
        factors = read_factors(self._body_parameters())
        roots = with_factors(self._roots, factors, self.dtype, self.device)
        self.sketching.precondition(roots)
        metric = weights_digest([t for root in roots.values() for t in root.tensors]) if factors else self._metric
        weights = weights_digest([t.held for t in self.targets])
        return FeatureSpace("sketch", tuple(self.sketching.blocks), self._tables, weights, metric)

    def _body_parameters(self) -> dict[str, nn.Parameter]:
        return {t.name: t.held for t in self.targets}

    def _use(self, roots: Mapping[str, Root]) -> None:
        self.sketching.precondition(roots)

    def step(self, t: int) -> AbstractContextManager[None]:
        """Mark a part of the model's forward pass as loop step ``t`` (0-based), with ``loop="manual"``."""
        return self.tapped.steps.manual_step(t)

    def explain(self) -> str:
        """A table of the body's parameters: shape, sketch, share of a feature row."""
        rows = [f"{'parameter':<44} {'shape':<16} {'columns':<16} sketch"]
        for target, block in zip(self.targets, self.sketching.blocks, strict=True):
            lossless = isinstance(target.sketch, CountSketch) and self.hashing != "iid"
            note = ", lossless" if lossless and target.sketch.m >= target.parameter.numel() else ""
            shape, columns = str(tuple(target.parameter.shape)), f"{block.start}:{block.stop}"
            rows.append(f"{target.name:<44} {shape:<16} {columns:<16} {target.sketch!r}{note}")
        item = torch.finfo(self.dtype).bits // 8
        rows.append(
            f"{len(self.targets)} parameters, {self.hashing} hashing ({HASH_FORMAT}), {self.layout} layout; "
            f"a feature row has {self.width} columns = {self.width * item / 1024:.1f} KiB per loop step"
        )
        return "\n".join(rows)

    def uses(self) -> Uses:
        """The uses of parameters in the last run: in how many steps, in how many batches the owners of their rows were
        followed through the forward pass or found by gradients, and how many were verified. Printed, a table."""
        return self._ledger.table()

    @property
    def _ledger(self) -> Ledger:
        return Ledger() if self._last is None else self._last.ledger

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
                given, or if the model is sharded over processes, the error is raised.

        Returns:
            :class:`Features` on the body's device, float32 (float64 for a float64 body).

        Raises:
            LossError: the loss has a wrong shape, no gradient, or is not finite (names the examples).
            BodyError: a body parameter is never used, or used outside the loop, or no step was entered; or another
                thread is featurizing this model.
            UnsupportedUseError: a use whose gradient cannot be captured (names parameter and operation).
            LayoutError: the examples of a batch cannot be told apart or influence one another.
        """
        session.check_source(loader, loss_fn)
        session.check_options(per_step=per_step, ids=ids, first_batch=first_batch, verify=verify, on_error=on_error)
        with one_thread(self.model):  # already here: what a capture knows of its run is the run's
            self._check_parameters()
            run = self.begin(loss_fn, self.space(), verify)
            features = self._featurize_loader(
                loader,
                run.featurize_batch,
                space=run.space,
                per_step=per_step,
                ids=ids,
                progress=progress,
                description="featurize",
                first_batch=first_batch,
                on_error=on_error,
            )
        if len(features) and run.verifying:
            run.usage.check(self.model, self.targets, last=True)
        return features

    def inline(
        self,
        batch: Any,
        *,
        ids: Sequence[Hashable] | None = None,
        per_step: bool = False,
        weighted: bool = False,
        verify: bool | None = None,
    ) -> Inline:
        """Featurize a batch within an ordinary training step, which keeps its gradients (docs/capture.md)::

            with capture.inline(batch) as inline:
                losses = inline.losses(loss_fn(model, batch))  # (B,), not reduced
                losses.mean().backward()
            optimizer.step()
            inline.features  # at the weights before the step

        The model runs as it is: in its own mode, with hooks, wrappers (DDP) and its own random state; parts under
        ``torch.compile`` run eagerly. What the training loss weights each example with is read and divided out.

        Args:
            batch: what the model is run on: its tensors tell the examples.
            ids: one hashable per example; places in the batch if not given.
            per_step: ``(B, steps, D)``, or ``(B, D)`` summed over steps.
            weighted: leave the weights in: rows are then the examples' parts in the gradient of the training loss, and
                weights may be 0. They are not comparable with features of :meth:`featurize`.
            verify: check that the examples' features add up to the sketch of the parameters' gradients, on the first
                batch and one in 64 after it; as given to :func:`attach` if None. Which row is whose is followed through
                the forward pass of every batch; where it cannot be, the batch is refused.

        Raises:
            LayoutError: the batch does not tell how many examples it has.
            BodyError: the model is sharded over processes.
        """
        self.sharding.refuse("capture.inline")
        check = self.verify if verify is None else verify
        self._inlined += 1
        return Inline(self, batch, ids, self._inlined - 1, per_step=per_step, weighted=weighted, verify=check)

    def begin(self, loss_fn: session.LossFn, space: FeatureSpace, verify: bool | None = None) -> SketchedRun:
        """Begin a run: batches with this loss follow, at the model's present weights.

        Args:
            space: :meth:`space`, as it is outside of :func:`~stepinfluence.capture.session.isolated`, which silences
                hooks.
            verify: as for :meth:`featurize`.
        """
        # Another loss, or other weights, may mix examples where the last did not; the weights outside the body are
        # known by where they lie and how often they were written.
        owned = {id(t.held) for t in self.targets}
        others = tuple((data_pointer(p), p._version) for p in self.model.parameters() if id(p) not in owned)
        state = (space, others, self.training, self.batch_dim)
        self._last = SketchedRun(
            self.tapped,
            self.sketching,
            space,
            loss_fn,
            checked=self._memory.recall(loss_fn, state, anew=verify is True),
            verifying=self.verify if verify is None else verify,
            reduced=self.reduced_loss,
        )
        return self._last


def attach(
    model: nn.Module,
    *,
    body: Body | None = None,
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
    workspace: int | None = None,
) -> Capture:
    """Make a capture for the loop body of a model.

    Args:
        model: any PyTorch module, perhaps wrapped (DDP, ``torch.compile``) or sharded over processes (docs/cluster.md).
        body: the module(s) that the loop applies at every step, or their names. Their trainable parameters are what
            influence is measured on; a step is one entry into a body module, however often a layer is used in it. If
            not given, the first batch that is featurized shows it: the outermost modules that its forward pass enters
            several times (:class:`~stepinfluence.capture.discovery.PendingCapture`).
        sketch_size: m, buckets per parameter (paper: 2048), or a mapping from parameter name to m, as
            :func:`~stepinfluence.allocate_sizes` makes them. A number is the most that a vector gets under balanced
            hashing: a shorter one is kept without loss in as many columns as it has entries.
        hashing: ``"balanced"`` (default, lower variance), ``"iid"`` (the paper's), or ``"block"`` (what
            ``route="shear"`` is for).
        seed: of the hash tables; features are comparable only for equal seeds.
        loop: how steps are counted: ``"entries"``, ``"timeline"`` or ``"manual"`` (see
            :class:`~stepinfluence.capture.body.steps.StepTracker`).
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
        workspace: bytes that activations and gradients of linear layers may keep alive in the backward pass while they
            wait to be sketched together, one call for all loop steps of a weight that fit; 0: every use at once. Each
            weight has an equal share, and a use of which not two fit in it does not wait. Features depend on it, and
            on shapes, in their last bits; never on how much memory is free. None: 32 MiB on a CPU, 1 GiB on a GPU.

    Raises:
        BodyError: ``body`` is not part of the model or has no trainable parameter.
        ValueError, TypeError: an option is not one of those above, or the preconditioner does not fit.
    """
    check_model(model, outside=outside, batch_dim=batch_dim, training=training, verify=verify)
    one_of("route", route, ROUTES)
    model = unwrap(model)

    def of(body: Body) -> Capture:
        modules, sharding = find_body(model, body), Sharding(model)
        used = sharding.used
        parameters = body_parameters(model, modules, used)
        targets = make_targets(parameters, used, sketch_size=sketch_size, hashing=hashing, seed=seed, layout=layout)
        return Capture(
            model,
            targets,
            StepTracker(model, modules, loop),
            Sketching(targets, route, layout, workspace),
            hashing=hashing,
            seed=seed,
            outside=outside,
            batch_dim=batch_dim,
            training=training,
            verify=verify,
            preconditioner=preconditioner,
            sharding=sharding,
        )

    # What stands in for a capture until its body is known is one in all that is asked of it.
    return of(body) if body is not None else cast(Capture, PendingCapture(model, of, training=training))
