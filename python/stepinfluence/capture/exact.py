"""``ExactCapture``: full per-example, per-step gradients, as the baseline that sketches are measured against.

It shares nothing with the sketching capture's interception: at every entry into the loop body the body's parameters
are replaced by fresh leaves, so that autograd itself tells the steps apart, and each example's loss is
differentiated on its own. Slow and large (B backward passes, ``B * steps * parameters`` numbers a batch), and hard to
get wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.attribution.features import FeatureBuilder, Features, weights_digest
from stepinfluence.attribution.preconditioners import Preconditioner, Root
from stepinfluence.attribution.space import Block, FeatureSpace
from stepinfluence.capture import diagnosis, session
from stepinfluence.capture.body.batches import infer_batch_size, settled_size
from stepinfluence.capture.body.hooks import read_factors, with_factors
from stepinfluence.capture.body.steps import Loop, StepTracker
from stepinfluence.capture.body.targets import Body, body_parameters, check_model, find_body, single_device, unwrap
from stepinfluence.capture.carried import Carried
from stepinfluence.capture.owners.calls import OUTSIDE
from stepinfluence.capture.sharded.layout import Sharding
from stepinfluence.errors import BodyError, UnsupportedUseError


@dataclass
class _Run:
    """One run through batches.

    Attributes:
        loss_fn: of the run.
        roots: what gradients are multiplied by, by name of the parameter.
        repeats: whether it was seen that a graph can be differentiated again.
    """

    loss_fn: session.LossFn
    roots: Mapping[str, Root]
    repeats: bool = False


class ExactCapture(session.LoaderCapture):
    """Same interface as :class:`~stepinfluence.Capture`; a feature row holds the gradients themselves.

    Args:
        model, body, loop, batch_dim, training, seed, preconditioner: as for :func:`~stepinfluence.attach`
            (``loop="manual"`` is not supported: steps are told apart at module entries; ``seed`` fixes the model's
            random state per batch).
        outside: ``"ignore"`` leaves uses outside the loop out, ``"error"`` refuses them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        body: Body,
        seed: int = 0,
        loop: Loop = "entries",
        outside: str = "error",
        batch_dim: int = 0,
        training: bool = False,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        check_model(model, outside=outside, batch_dim=batch_dim, training=training)
        self.sharding = Sharding(unwrap(model))
        self.sharding.refuse("ExactCapture")
        if loop == "manual":
            raise ValueError("loop: got 'manual'; ExactCapture tells steps apart at module entries, use 'entries'")
        self.model = unwrap(model)
        self.body = find_body(self.model, body)
        self.parameters = body_parameters(self.model, self.body)
        self.device = single_device(self.parameters)
        self.seed = seed
        self.batch_dim = batch_dim
        self.training = training
        self._outside = outside
        self._steps = StepTracker(self.model, self.body, loop)
        self._slots = [
            (module, key, name)
            for name, parameter in self.parameters.items()
            for module in self.model.modules()
            for key, held in module._parameters.items()
            if held is parameter
        ]
        blocks, start = [], 0
        for name, parameter in self.parameters.items():
            blocks.append(Block(name, tuple(parameter.shape), start, start + parameter.numel()))
            start += parameter.numel()
        self._blocks = tuple(blocks)
        double = any(p.dtype == torch.float64 for p in self.parameters.values())
        self.dtype = torch.float64 if double else torch.float32
        self.precondition(preconditioner)

    @property
    def width(self) -> int:
        """D: the number of body parameters."""
        return self._blocks[-1].stop

    @property
    def step_log(self) -> StepTracker:
        """The loop steps of the last forward pass."""
        return self._steps

    def space(self) -> FeatureSpace:
        """What the columns of this capture's features mean, at the model's present weights and hooks on them.

        Raises:
            UnsupportedUseError: as for ``Capture.space``.
        """
        factors = read_factors(self.parameters)
        applied = self._applied(factors)
        metric = weights_digest([t for r in applied.values() for t in r.tensors]) if factors else self._metric
        return FeatureSpace("exact", self._blocks, "", weights_digest(list(self.parameters.values())), metric)

    def _applied(self, factors: Mapping[str, Tensor] | None = None) -> dict[str, Root]:
        """What gradients are multiplied by: roots of the metric with the factors of hooks."""
        factors = read_factors(self.parameters) if factors is None else factors
        return with_factors(self._roots, factors, self.dtype, self.device)

    def _body_parameters(self) -> dict[str, nn.Parameter]:
        return self.parameters

    def _use(self, roots: Mapping[str, Root]) -> None:
        """Any can be applied, when a run begins."""

    def featurize(
        self,
        loader: Iterable[Any],
        loss_fn: session.LossFn,
        *,
        per_step: bool = True,
        ids: session.IdsOf | None = None,
        progress: bool = True,
        first_batch: int = 0,
    ) -> Features:
        """Full gradients of every example of a loader; arguments and result as for ``Capture.featurize``.

        Raises:
            LossError, BodyError: as for ``Capture.featurize``.
            UnsupportedUseError: a gradient hook that cannot be applied to single examples (names the parameter).
        """
        session.check_source(loader, loss_fn)
        session.check_options(per_step=per_step, ids=ids, first_batch=first_batch)
        space = self.space()
        run = _Run(loss_fn, self._applied())
        return self._featurize_loader(
            loader,
            functools.partial(self._featurize_batch, run),
            space=space,
            per_step=per_step,
            ids=ids,
            progress=progress,
            description="exact gradients",
            first_batch=first_batch,
        )

    def _featurize_batch(
        self, run: _Run, builder: FeatureBuilder, batch: Any, ids: Sequence[Hashable] | None, index: int
    ) -> Tensor:
        leaves: list[dict[str, Tensor]] = []
        began = diagnosis.now()
        losses, carried = self._forward(batch, run.loss_fn, leaves, index)
        if not leaves:
            raise diagnosis.never_entered(
                self.model, lambda: self._count_steps(batch, run.loss_fn, index), training=self.training
            )
        session.check_losses(losses, settled_size(batch, self.batch_dim, losses), ids)
        for name, user in diagnosis.reaching(losses, {id(p): n for n, p in self.parameters.items()}):
            diagnosis.refuse_earlier(name, user, began)
        steps, names = len(leaves), list(self.parameters)
        buffer = builder.reserve(len(losses), steps)
        inputs = [leaf[name] for leaf in leaves for name in names]
        originals = list(self.parameters.values())
        first: Sequence[Tensor | None] = ()
        for k, loss in enumerate(losses):
            wanted = [*inputs, *originals, *(leaf for _, _, leaf in carried)]
            grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            first = first or grads
            rows = buffer[k] if buffer.dim() == 3 else buffer[k].expand(steps, -1)
            for at, grad in enumerate(grads[: len(inputs) + len(originals)]):
                self._add(run, rows, at // len(names) if at < len(inputs) else OUTSIDE, at % len(names), grad)
            for (tensor, step, _), over in zip(carried, grads[len(wanted) - len(carried) :], strict=True):
                if over is not None:
                    back = torch.autograd.grad(
                        tensor, [*inputs, *originals], over, retain_graph=True, allow_unused=True
                    )
                    for at, grad in enumerate(back):
                        self._add(run, rows, step, at % len(names), grad)
        session.check_features(buffer, ids)
        if not run.repeats and len(losses) > 1:
            run.repeats = True
            self._check_repeats(losses[0], inputs, first)
        lengths = None
        if buffer.dim() == 3:
            lengths = (torch.arange(1, steps + 1, device=buffer.device) * (buffer != 0).any(-1)).amax(1).cpu()
        values = losses.detach().to("cpu", torch.float32)
        given = list(ids) if ids is not None else list(range(builder.count, builder.count + len(losses)))
        builder.commit(given, values, self._steps.labels, lengths)
        return values

    def _add(self, run: _Run, rows: Tensor, step: int, at: int, grad: Tensor | None) -> None:
        """Add the gradient of a parameter, given by its place, to the row of a step.

        Raises:
            BodyError: it is of a use outside the loop, and such uses are not ignored (names the parameter).
        """
        if grad is None:
            return
        block = self._blocks[at]
        if step == OUTSIDE:
            if self._outside == "error":
                raise BodyError(
                    f"{block.name}: used outside the loop body; pass outside='ignore' to leave such uses out"
                )
            return
        dense = grad.to_dense() if grad.is_sparse else grad  # nn.Embedding(sparse=True)
        flat = dense.flatten().to(rows.dtype)
        root = run.roots.get(block.name)
        rows[step, block.start : block.stop] += flat if root is None else flat * root.as_matrix().flatten()

    def _check_repeats(self, loss: Tensor, inputs: Sequence[Tensor], before: Sequence[Tensor | None]) -> None:
        """One graph is differentiated once per example: what acts in the first backward pass only (a hook that takes
        itself off, a count) would reach the first example alone."""
        names = list(self.parameters)
        for at, (now, was) in enumerate(
            zip(torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True), before, strict=False)
        ):
            if now is None or was is None:
                continue
            now, was = (g.to_dense() if g.is_sparse else g for g in (now, was))
            if float((now - was).norm()) > 1e-3 * float(was.norm()):
                raise UnsupportedUseError(
                    f"{names[at % len(names)]}: its gradient is another one when it is taken again: something in the "
                    "backward pass acts once or keeps count (a hook that takes itself off); take that out while "
                    "featurizing"
                )

    def _count_steps(self, batch: Any, loss_fn: session.LossFn, index: int) -> int:
        session.begin_pass(self.model, self.seed, index)
        self._steps.reset()
        with self._steps.watching(), session.watched(self.model):
            loss_fn(self.model, batch)
        return self._steps.count

    def _forward(
        self, batch: Any, loss_fn: session.LossFn, leaves: list[dict[str, Tensor]], index: int
    ) -> tuple[Tensor, list[tuple[Tensor, int, Tensor]]]:
        """The losses, with body parameters replaced by leaves of their own at every step; and what was carried from
        one step to another, see :class:`~stepinfluence.capture.carried.Carried`."""
        originals = self.parameters
        dims = (self.batch_dim,) if self.batch_dim == 0 else (self.batch_dim, 0)
        carried = Carried(self.model, self._steps, infer_batch_size(batch, self.batch_dim), dims)
        for parameter in originals.values():
            carried.note(parameter, OUTSIDE)
        depth: list[int] = []
        own = {id(parameter) for parameter in originals.values()}

        def place(step: int | None) -> None:
            for module, key, name in self._slots:
                if id(module._parameters.get(key)) not in own:
                    continue  # the model computes with another tensor here (torch.func.functional_call)
                # By attribute: recurrent layers keep a list of their weights beside, and update it then.
                setattr(module, key, originals[name] if step is None else leaves[step][name])

        def enter(_module: nn.Module, _inputs: Any) -> None:
            step = self._steps.current
            if step is None:  # a recomputation in the backward pass: values are all that counts
                return
            while len(leaves) <= step:
                leaves.append({n: nn.Parameter(p.detach().clone()) for n, p in originals.items()})
                for leaf in leaves[-1].values():
                    carried.note(leaf, len(leaves) - 1)
                    own.add(id(leaf))
            depth.append(step)
            place(step)

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if depth:
                depth.pop()
                place(depth[-1] if depth else None)

        session.begin_pass(self.model, self.seed, index)
        self._steps.reset()
        handles = []
        for module in self.body:
            # Registered before the step tracker's, and so called after them.
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            with self._steps.watching(), carried, session.watched(self.model):
                losses: Tensor = loss_fn(self.model, batch)
        finally:
            place(None)
            for handle in handles:
                handle.remove()
        return losses, carried.used
