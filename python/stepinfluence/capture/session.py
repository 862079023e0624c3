"""What every capture does around a forward and backward pass: isolation of the model, losses, the featurize loop."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from stepinfluence.arguments import boolean, function, non_negative_int
from stepinfluence.attribution.features import FeatureBuilder, Features, weights_digest
from stepinfluence.attribution.preconditioners import Preconditioner, Root, prepare
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.capture.body import state
from stepinfluence.capture.body.batches import expected_rows, fingerprints, length_of, usable
from stepinfluence.capture.body.threads import one_thread
from stepinfluence.capture.diagnosis import check_parameters
from stepinfluence.capture.sharded.layout import Sharding
from stepinfluence.errors import BodyError, ExampleLossError, LossError, LossFunctionError
from stepinfluence.loaders import IdsOf as IdsOf
from stepinfluence.loaders import LossFn as LossFn
from stepinfluence.loaders import ids_in

OnError: TypeAlias = Callable[[Exception], None]
FeaturizeBatch: TypeAlias = Callable[[FeatureBuilder, Any, "Sequence[Hashable] | None", int], Tensor]
"""``(builder, batch, ids, index) -> losses (B,)``: adds the features of one batch to the builder."""


@contextmanager
def isolated(model: nn.Module, *, training: bool, sharding: Sharding | None = None) -> Iterator[None]:
    """Run the model without leaving a trace in it: modes, buffers, attributes, weights, gradients, hooks and random
    state come back as they were (:mod:`stepinfluence.capture.body.state`).

    ``torch.compile``d parts run eagerly within: their parameters' uses could not be seen otherwise.

    Args:
        sharding: how the model is spread over processes, where a capture knows it.

    Raises:
        BodyError: another thread is at it.
    """
    modes = {module: module.training for module in model.modules()}
    streams = random.getstate(), np.random.get_state()  # noqa: NPY002  # what models draw loop counts from
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(one_thread(model))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        sharding = Sharding(model) if sharding is None else sharding
        stack.enter_context(sharding.running())
        stack.enter_context(state.keeping(model, sharding.gathered.wholes.values()))
        model.train(training)
        try:
            yield
        finally:
            random.setstate(streams[0])
            np.random.set_state(streams[1])  # noqa: NPY002
            for module, mode in modes.items():
                module.training = mode


def begin_pass(model: nn.Module, seed: int, index: int) -> None:
    """Before every forward pass of batch ``index``: the model as it was when the batch began, and the batch's random
    state."""
    if (kept := state.running(model)) is not None:
        kept.put_back()
    seed_batch(seed, index)


def watched(model: nn.Module, watcher: state.Watcher | None = None) -> AbstractContextManager[object]:
    """Around every forward pass, see :meth:`stepinfluence.capture.body.state.ModelState.watched`."""
    kept = state.running(model)
    return nullcontext() if kept is None else kept.watched(watcher)


def one_batch(model: nn.Module) -> AbstractContextManager[object]:
    """Around all passes of one batch, see :meth:`stepinfluence.capture.body.state.ModelState.batch`."""
    kept = state.running(model)
    return nullcontext() if kept is None else kept.batch()


def seed_batch(seed: int, index: int) -> None:
    """Random state of a batch (torch's, Python's and numpy's): a function of (seed, position of the batch), so that
    featurizing repeats exactly."""
    state = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
    if torch.accelerator.current_accelerator() is None:
        torch.default_generator.manual_seed(state)  # torch.manual_seed takes a stack trace for each kind of device
    else:
        torch.manual_seed(state)
    random.seed(state)
    np.random.seed(state % 2**32)  # noqa: NPY002


def check_losses(losses: object, batch_size: int | None, ids: Sequence[Hashable] | None) -> Tensor:
    """The per-example losses of a batch.

    Raises:
        LossError: not a tensor of shape ``(B,)``, without gradient, or not finite (names the examples).
    """
    if not isinstance(losses, Tensor):
        raise LossFunctionError(
            f"loss_fn: returned {type(losses).__name__}; return a tensor of shape (B,), one loss per example"
        )
    if losses.is_complex():
        raise LossFunctionError(
            f"loss_fn: returned {losses.dtype}; return real losses, such as squared absolute values"
        )
    if losses.dim() != 1 or (batch_size is not None and len(losses) != batch_size):
        want = f"({batch_size},)" if batch_size is not None else "(B,)"
        raise LossFunctionError(
            f"loss_fn: returned shape {tuple(losses.shape)}, expected {want}; return one loss per example, "
            "without reducing over the batch"
        )
    if ids is not None and len(ids) != len(losses):
        raise LossError(f"ids: got {len(ids)} for a batch of {len(losses)} examples; give one per example")
    if not losses.requires_grad:
        raise LossFunctionError(
            "loss_fn: its result does not require grad; do not detach it or run the model under no_grad"
        )
    finite = torch.isfinite(losses.detach())
    if not bool(finite.all()):
        raise ExampleLossError(
            f"loss_fn: loss is NaN or infinite for example(s) {_named(~finite, ids)}; remove or mend them"
        )
    return losses


def check_features(features: Tensor, ids: Sequence[Hashable] | None) -> None:
    """The features ``(B, ...)`` of a batch: a finite loss can have gradients that are not.

    Raises:
        LossError: some are NaN or infinite (names the examples).
    """
    # A sum is finite only if all that went into it is: one pass, no mask of the buffer's size.
    finite = torch.isfinite(features.sum(tuple(range(1, features.dim()))))
    if not bool(finite.all()):
        raise ExampleLossError(
            f"loss_fn: gradients are NaN or infinite for example(s) {_named(~finite, ids)}, though the loss is finite; "
            "look for a root or logarithm at zero in the model, or an overflow in half precision"
        )


def _named(chosen: Tensor, ids: Sequence[Hashable] | None) -> str:
    bad = [int(k) for k in chosen.nonzero().flatten()]
    shown = ", ".join(repr(ids[k]) if ids is not None else f"row {k}" for k in bad[:5])
    return shown + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")


class _NoBar:
    """Stands in for a progress bar that is not to be shown."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def set_postfix(self, **_: object) -> None:
        """Nothing to write to."""


@contextmanager
def _progress_bar(loader: Iterable[Any], total: int | None, description: str, *, shown: bool) -> Iterator[Any]:
    """``loader`` with a progress bar on work of over two seconds; tqdm is needed only where one is shown."""
    if not shown:
        yield _NoBar(loader)
        return
    from stepinfluence.progress import tqdm

    # tqdm asks a loader itself for its length, and fails at one that raises.
    with tqdm(
        loader if total is not None else iter(loader), total=total, desc=description, unit="batch", delay=2
    ) as bar:
        yield bar


def check_options(
    *, per_step: object, ids: object, first_batch: object, verify: object = None, on_error: object = None
) -> None:
    """The options of a run over a loader.

    Raises:
        TypeError, ValueError: one of them is not of its type (names it).
    """
    boolean("per_step", per_step)
    non_negative_int("first_batch", first_batch)
    if verify is not None:
        boolean("verify", verify)
    if ids is not None:
        function("ids", ids, "ids(batch) -> one hashable per example")
    if on_error is not None:
        function("on_error", on_error, "on_error(error)")


def check_source(loader: object, loss_fn: object) -> None:
    """What is featurized, and with which loss.

    Raises:
        TypeError: a loader that gives no batches, or a loss that is no function (names it).
    """
    gives = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if not gives or isinstance(loader, Mapping | str | bytes):
        raise TypeError(f"loader: got {type(loader).__name__}; pass a DataLoader or a list of batches, [batch] for one")
    function("loss_fn", loss_fn, "loss_fn(model, batch) -> losses (B,)")


class OfOneModel:
    """What knows the tensors of a model by their identity, and so cannot go with a copy of it."""

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: belongs to the tensors of one model and cannot be copied or pickled; copy or save "
            "the model, keep the capture outside of it, and attach again"
        )


class LoaderCapture(OfOneModel, ABC):
    """A capture's way through a loader, the same for sketches and exact gradients."""

    model: nn.Module
    device: torch.device
    training: bool
    batch_dim: int
    dtype: torch.dtype
    sharding: Sharding

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the length of a feature row."""

    @abstractmethod
    def _body_parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that features are of, by name."""

    @property
    def preconditioner(self) -> Preconditioner | None:
        """The metric that features are taken under; :meth:`precondition` changes it."""
        return self._preconditioner

    def precondition(self, preconditioner: Preconditioner | None) -> None:
        """Featurize under another metric from now on; None for the plain gradient.

        Raises:
            TypeError, ValueError: as for :func:`~stepinfluence.attach`.
        """
        roots, metric = prepare(preconditioner, self._body_parameters(), self.dtype, self.device)
        self._use(roots)
        self._roots, self._metric, self._preconditioner = roots, metric, preconditioner

    @abstractmethod
    def _use(self, roots: Mapping[str, Root]) -> None:
        """Multiply gradients by these roots of a metric from now on; raises where that is not possible."""

    @abstractmethod
    def space(self) -> FeatureSpace:
        """What the columns of this capture's features mean, at the model's present weights."""

    def _check_parameters(self) -> None:
        """See :func:`~stepinfluence.capture.diagnosis.check_parameters`."""
        check_parameters(self.model, self._body_parameters())

    def _spare_builder(self, per_step: bool) -> FeatureBuilder:
        return FeatureBuilder(self.width, self.dtype, self.device, per_step=per_step, expected=0)

    def _featurize_loader(
        self,
        loader: Iterable[Any],
        featurize_batch: FeaturizeBatch,
        *,
        space: FeatureSpace,
        per_step: bool,
        ids: IdsOf | None,
        progress: bool,
        description: str,
        first_batch: int,
        on_error: OnError | None = None,
    ) -> Features:
        """Featurize every batch of a loader; the progress bar shows only on work that takes over two seconds."""
        self._check_parameters()
        with torch.inference_mode(False):  # features are tensors like any other, wherever they are made
            builder = FeatureBuilder(
                self.width, self.dtype, self.device, per_step=per_step, expected=expected_rows(loader)
            )
        total = length_of(loader)
        with (
            isolated(self.model, training=self.training, sharding=self.sharding),
            _progress_bar(loader, total, description, shown=progress) as bar,
        ):
            index = first_batch - 1
            for whatever, kept in self.sharding.company.batches(bar):
                if not kept:  # another process has batches left, and needs this one's weights
                    with one_batch(self.model):
                        featurize_batch(self._spare_builder(per_step), usable(whatever), None, index)
                    continue
                index += 1
                batch = usable(whatever)
                given = ids_in(batch, ids)
                try:
                    with one_batch(self.model):
                        losses = featurize_batch(builder, batch, given, index)
                    if given is None:
                        builder.fingerprints += fingerprints(batch, len(losses), self.batch_dim)
                except Exception as error:
                    if on_error is None:
                        raise
                    on_error(error)
                    if not self.sharding.company.alone:  # the others are in the middle of the same batch
                        raise
                    builder.discard()
                    continue
                bar.set_postfix(examples=builder.count, loss=f"{float(losses.mean()):.3g}", refresh=False)
        if index < first_batch:
            raise ValueError(
                "loader: gave no batch; pass a loader with examples (one that gives its batches once is empty now)"
            )
        if weights_digest(list(self._body_parameters().values())) != space.weights:
            raise BodyError(
                "body: its weights are others than before (the forward pass or the loss changes them, through .data or "
                "another tensor); change weights outside of a run, or load them again"
            )
        with torch.inference_mode(False):
            return builder.finish(space)
