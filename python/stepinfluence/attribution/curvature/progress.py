"""How far a training had come at its checkpoints, read from their optimizer's state (:mod:`.length`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from torch import nn

from stepinfluence.attribution.border import border
from stepinfluence.attribution.checkpoints import Checkpoint, PathLike, Reader, load_checkpoint
from stepinfluence.attribution.curvature.length import Progress, TrainingTime, known
from stepinfluence.attribution.preconditioners import Kind, adam_root, of_state_dict
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.errors import CheckpointError
from stepinfluence.wrappers import canonical_name, unwrap

SGD_OPTIONS = frozenset(("momentum", "dampening", "nesterov"))
ADAM_OPTIONS = frozenset(("betas", "eps", "amsgrad"))
NOT_ADAM = frozenset(("momentum_decay",))
"""NAdam's, which has Adam's options as well."""

DIGITS = 6
"""Significant digits of a gain: sums over many entries differ in their last bits between machines."""


class Body(Protocol):
    """What a training's length is asked for: :class:`~stepinfluence.Capture` and ``ExactCapture`` are such."""

    model: nn.Module

    def space(self) -> FeatureSpace: ...


Group: TypeAlias = Mapping[str, Any]


def progress_at(checkpoint: Checkpoint, body: Body, *, metric: Kind = "sgd") -> Progress | str:
    """How far training had come at a checkpoint; or, in words, why that cannot be told.

    Of the optimizers of ``torch.optim``, SGD (with momentum) and Adam (AdamW) are known. Adam counts its updates; for
    SGD the file has to (:attr:`.Checkpoint.updates`).

    Args:
        checkpoint: with its optimizer's state.
        body: whose trainable parameters' learning rate and moments are meant.
        metric: that features are taken under, see :func:`.preconditioners.from_optimizer`.
    """
    try:
        with border("its optimizer's state is not readable"):
            return _progress(checkpoint, body, metric)
    except CheckpointError as error:
        return str(error)


def _progress(checkpoint: Checkpoint, body: Body, metric: Kind) -> Progress:
    if checkpoint.optimizer is None:
        raise CheckpointError("it has no optimizer state; save it beside the model")
    names = [block.name for block in body.space().blocks]
    groups = list(checkpoint.optimizer.get("param_groups") or [])
    kinds = {_kind(group) for group in groups}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        options = sorted({str(key) for group in groups for key in group} - {"params", "param_names", "lr"})
        raise CheckpointError(
            f"its optimizer is neither SGD nor Adam (its options are {', '.join(options) or 'none'}), and what others "
            "multiply gradients with is not known"
        )
    if kind == "sgd" and metric != "sgd":
        raise CheckpointError(f"features are under the metric {metric!r}, and it was trained by SGD")
    if kind == "sgd" and len({_pace(group) for group in groups}) == 1:
        return _progress_of(groups[:1], checkpoint.updates, 1.0)  # nobody need know which parameters a group has
    states = _of_body(checkpoint.optimizer, body.model, names)
    if kind == "sgd":
        return _progress_of([group for group, _ in states.values()], checkpoint.updates, 1.0)
    parameters = {canonical_name(name): p for name, p in unwrap(body.model).named_parameters()}
    total = count = 0.0
    for name, (group, state) in states.items():
        root = adam_root(name, parameters[name], group, state)
        total += float(root.sqrt.double().pow(-2).sum())
        count += root.sqrt.numel()
    updates = int(max(float(state["step"]) for _, state in states.values()))
    gain = 1.0 if metric == "adam" else float(f"{count / total:.{DIGITS}g}")
    return _progress_of([group for group, _ in states.values()], updates, gain)


def _kind(group: Group) -> Literal["sgd", "adam"] | None:
    options = set(group)
    if group.get("maximize"):
        return None
    if options >= SGD_OPTIONS and not options & {"ns_steps", "betas"}:
        return "sgd"
    return "adam" if options >= ADAM_OPTIONS and not options & NOT_ADAM else None


def _pace(group: Group) -> tuple[float, float | None]:
    """Learning rate, and the one that a scheduler began with; of SGD as its momentum makes it."""
    factor = 1.0
    if "momentum" in group:
        momentum = float(group["momentum"])
        if not 0 <= momentum < 1:
            raise CheckpointError(f"its momentum is {momentum}, under which a steady gradient has no steady pace")
        factor = (1 - float(group["dampening"]) if momentum else 1.0) / (1 - momentum)
    first = group.get("initial_lr")
    return factor * float(group["lr"]), None if first is None else factor * float(first)


def _of_body(
    optimizer: Mapping[str, Any], model: nn.Module, names: Sequence[str]
) -> dict[str, tuple[Group, Mapping[str, Any]]]:
    """Group and state of each parameter of the body."""
    parameters = {canonical_name(name): p for name, p in unwrap(model).named_parameters()}
    found = {name: (group, state) for name, group, state in of_state_dict(optimizer, parameters)}
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise CheckpointError(f"body parameter {missing!r} is not one that its optimizer trained")
    return {name: found[name] for name in names}


def _progress_of(groups: Sequence[Group], updates: int | None, gain: float) -> Progress:
    paces = sorted({_pace(group) for group in groups}, key=str)
    if len(paces) != 1:
        rates = ", ".join(f"{rate:g}" for rate, _ in paces)
        raise CheckpointError(f"the body's parameters have several learning rates ({rates})")
    if updates is None:
        raise CheckpointError(
            "it does not say how many updates had been made; save the number as 'step' beside 'model' and 'optimizer'"
        )
    (rate, first) = paces[0]
    return Progress(updates, rate, gain, first)


def training_time(
    checkpoints: PathLike | Sequence[PathLike], body: Body, *, metric: Kind = "sgd", reader: Reader | None = None
) -> TrainingTime:
    """Training's length by each of its checkpoints, read from their optimizers' states: a ``damping`` for features of
    these checkpoints (docs/curvature.md).

    Args:
        checkpoints: paths, in the order of training; each is read.
        body: the capture that features come from.
        metric: that they are taken under: ``"sgd"`` (plainly) or ``"adam"``.
        reader: a function of yours that reads a checkpoint, see :func:`~stepinfluence.load_checkpoint`.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        ValueError: it does not say how far training had come (says why), or together they do not, see
            :meth:`.TrainingTime.of`.
    """
    paths = [checkpoints] if not isinstance(checkpoints, Sequence) or isinstance(checkpoints, str) else checkpoints
    found = [(str(path), progress_at(load_checkpoint(path, reader=reader), body, metric=metric)) for path in paths]
    return TrainingTime.of(known(found))
