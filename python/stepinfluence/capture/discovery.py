"""Finding the loop body of a model: what a forward pass enters more than once."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from stepinfluence.attribution.features import Features
from stepinfluence.capture import session
from stepinfluence.capture.body.batches import infer_batch_size, length_of, usable
from stepinfluence.capture.body.steps import StepTracker
from stepinfluence.errors import BodyError
from stepinfluence.loaders import LossFn


def find_loop(model: nn.Module, forward: Callable[[], Any], *, training: bool = False) -> dict[str, int]:
    """The outermost modules with parameters that a forward pass enters more than once, and how often each is entered.

    Args:
        model: the model; it is left as it was.
        forward: runs it once on any input.
        training: run it in training mode rather than in evaluation mode.

    Returns:
        By names as ``model.named_modules()`` has them, in its order: a shared layer, or several parts of one loop.

    Raises:
        BodyError: no module with parameters is entered more than once.
    """
    names = {module: name for name, module in model.named_modules()}
    entered: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda module, _: entered.update([names[module]]))
        for module in names
        if next(module.parameters(), None) is not None
    ]
    modes = {module: module.training for module in names}
    try:
        model.train(training)
        with torch.enable_grad():  # as in a run: models may put hooks on tensors
            forward()
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    repeated = {name for name, count in entered.items() if count > 1}
    outermost = [n for n in names.values() if n in repeated and not any(p in repeated for p in _parents(n))]
    if not outermost or "" in repeated:
        raise BodyError("no module is entered more than once in a forward pass: this model has no loop to attribute to")
    return {name: entered[name] for name in outermost}


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def warn_if_the_loop_is_elsewhere(model: nn.Module, body: str, forward: Callable[[], Any]) -> None:
    """Warn where a body that was entered once stands beside modules that are entered several times.

    Args:
        model, forward: as for :func:`find_loop`.
        body: what was entered once, in words.
    """
    try:
        found = find_loop(model, forward, training=model.training)
    except BodyError:  # no loop at all: one step is all there is
        return
    likely = ", ".join(f"{name} ({count} times)" for name, count in found.items())
    warnings.warn(
        f"body: {body} was entered once in a forward pass, so that there is one step; entered several times: {likely}. "
        "Pass that as body for influence by loop step",
        stacklevel=2,
    )


class Featurizing(Protocol):
    """What :class:`PendingCapture` needs of a capture."""

    @property
    def width(self) -> int: ...

    @property
    def targets(self) -> list[Any]: ...

    @property
    def step_log(self) -> StepTracker: ...

    @property
    def featurize(self) -> Callable[..., Features]: ...


C = TypeVar("C", bound=Featurizing)


class PendingCapture(session.OfOneModel, Generic[C]):
    """A capture whose loop body is not known yet: the first batch that it featurizes shows it. Then it is that capture
    in all else, and ``capture`` is the capture itself.

    Args:
        model: unwrapped.
        make: makes the capture of a body, given by names.
        training: the mode in which the model is run.
    """

    def __init__(self, model: nn.Module, make: Callable[[list[str]], C], *, training: bool) -> None:
        self.model = model
        self._make, self._training = make, training
        self._capture: C | None = None

    @property
    def capture(self) -> C:
        """The capture of the body that was found.

        Raises:
            BodyError: nothing has been featurized yet.
        """
        if self._capture is None:
            raise BodyError(
                "body: not known yet: the first batch that is featurized shows it; featurize first, or attach with body"
            )
        return self._capture

    def featurize(self, loader: Iterable[Any], loss_fn: LossFn, **options: Any) -> Features:
        """As ``Capture.featurize``; the first call finds the loop body and says which it is.

        Raises:
            BodyError: no module with parameters is entered several times in a forward pass.
            ValueError: the loader gives no batch.
        """
        session.check_source(loader, loss_fn)
        if self._capture is None:
            batches = iter(loader)
            first = next(batches, None)
            if first is None:
                raise ValueError("loader: gave no batch; there is nothing to find the loop in")
            self._find(first, loss_fn, loader, per_step=options.get("per_step", True))
            if batches is loader:  # it gives its batches once
                loader = itertools.chain([first], batches)
        return self.capture.featurize(loader, loss_fn, **options)

    def _find(self, batch: Any, loss_fn: LossFn, loader: Iterable[Any], *, per_step: bool) -> None:
        with session.isolated(self.model, training=self._training), session.one_batch(self.model):
            session.begin_pass(self.model, 0, 0)
            given = usable(batch)
            with session.watched(self.model):
                found = find_loop(self.model, lambda: loss_fn(self.model, given), training=self._training)
        self._capture = capture = self._make(list(found))
        size, batches = infer_batch_size(batch), length_of(loader)
        # Each module counts its own entries, unless steps are numbered in the order of entry.
        steps = (sum if capture.step_log.loop == "timeline" else max)(found.values())
        rows = steps if per_step else 1
        amount = f"{_size(4 * rows * capture.width)} of features for each example"
        if size is not None and batches is not None:
            amount = f"{_size(4 * rows * capture.width * size * batches)} of features for {size * batches:,} examples"
        print(
            f"loop body: {', '.join(found)} ({steps} steps, {len(capture.targets)} parameters, {amount})",
            file=sys.stderr,
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        return getattr(self.capture, name)

    def __repr__(self) -> str:
        if self._capture is None:
            return f"PendingCapture({type(self.model).__name__}, loop body not known yet)"
        return repr(self._capture)


def _size(count: int) -> str:
    from tqdm import tqdm  # not on every GPU machine

    text = str(tqdm.format_sizeof(count, "", 1024))
    return f"{text[:-1]} {text[-1].upper()}iB" if text[-1].isalpha() else f"{text} bytes"
