"""Why a check failed: each cause has a test of its own, so that the message does not name another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.capture.body.state import running
from stepinfluence.capture.owners.calls import OUTSIDE
from stepinfluence.capture.owners.rows import Told, Use
from stepinfluence.errors import BodyError, LayoutError, LossError, StepInfluenceError, UnsupportedUseError

UNDERFLOW = "in half precision (fp16); multiply the loss by a constant (its scale is yours), or use bfloat16 or float32"


def check_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Before a run: the body's parameters are still the model's, and can take part in a backward pass.

    Raises:
        BodyError: names the parameter.
    """
    held = {id(p) for p in model.parameters()}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            raise BodyError(
                f"{name}: is not in the model any more: it was replaced after the capture was made (by assignment, "
                "load_state_dict(assign=True) or a conversion); attach again"
            )
        if not parameter.requires_grad:
            raise BodyError(
                f"{name}: requires_grad was switched off after the capture was made; switch it on, or attach again"
            )
        if parameter.is_inference():
            raise BodyError(
                f"{name}: was made under torch.inference_mode(), where no gradients are taken of it; build and load "
                "the model outside of it"
            )


_LEAF: Any = type(torch.zeros((), requires_grad=True).exp().grad_fn.next_functions[0][0])  # type: ignore[union-attr]
"""The graph node of a leaf."""


def now() -> int:
    """The place in autograd's order of what is computed from now on."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).exp().grad_fn
    assert node is not None
    return int(node._sequence_nr())


def reaching(losses: Tensor, parameters: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    """(name, graph node that uses it) of leaves, given by identity: all their uses in the graph behind ``losses``."""
    seen: set[Any] = set()
    stack: list[Any] = [losses.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if type(following) is not _LEAF:
                stack.append(following)
            elif (name := parameters.get(id(following.variable))) is not None:
                yield name, node


def refuse_earlier(name: str, user: Any, since: int) -> None:
    """Refuse a use of a parameter by a graph node that was made before this pass.

    Args:
        since: :func:`now`, before the pass.

    Raises:
        UnsupportedUseError: names the parameter.
    """
    if getattr(user, "_sequence_nr", lambda: since)() < since:
        raise UnsupportedUseError(
            f"{name}: reaches the loss through a tensor that was computed in an earlier pass ({user.name()}) and "
            "kept; clear what the model or the loss keeps, so that every forward pass computes it anew"
        )


def may_be_one_by_one(uses: Iterable[Use], told: Told, size: int, steps: int) -> bool:
    """Whether no step has rows of several examples, as far as they were followed."""
    if not 1 < size <= steps:
        return False
    known = (u.owners for u in uses if u.step != OUTSIDE and u.owners is not None)
    return told == "found" or not any(bool(o.lo.min() < o.hi.max()) for o in known if o.lo.numel())


def refuse_one_by_one(features: Tensor) -> None:
    """Refuse features by step ``(B, steps, D)`` of a loop that was run for one example at a time.

    Raises:
        LayoutError: as said (names the second example that was run, and its first step).
    """
    active = (features != 0).any(-1)
    if bool((active.sum(0) > 1).any()) or int(active.any(1).sum()) < 2:
        return
    whose = [(step, int(one.nonzero()[0, 0])) for step, one in enumerate(active.T) if bool(one.any())]
    step, example = next((step, example) for step, example in whose if example != whose[0][1])
    raise LayoutError(
        "loss_fn: runs the loop for one example of the batch at a time, so that steps are counted on from one to the "
        f"next (the first of example {example} is step {step + 1}); run the batch in one pass (padded), give batches "
        "of one, mark steps yourself (loop='manual'), or pass per_step=False"
    )


def never_entered(model: nn.Module, again: Callable[[], int], *, training: bool) -> BodyError:
    """The error for a forward pass that did not enter the loop.

    Args:
        again: runs the forward pass once more and counts its steps.
    """
    if not training:
        if (kept := running(model)) is not None:
            kept.put_back()  # now, so that it does not undo the change of modes
        modes = {module: module.training for module in model.modules()}
        try:
            model.train(True)
            entered = again() > 0
        except Exception:  # whatever the model cannot do in training mode is not what went wrong
            entered = False
        finally:
            for module, mode in modes.items():
                module.training = mode
        if entered:
            return BodyError(
                "body: the loop was never entered: the model runs it in training mode only, and was run in eval mode; "
                "pass training=True"
            )
    return BodyError(
        "body: the loop was never entered; body must be the module(s) whose forward runs at every step "
        "(or loop='manual' with capture.step(t))"
    )


def other_losses(plain: Callable[[], Tensor]) -> LossError:
    """The error for a batch whose losses are others when it is run again.

    Args:
        plain: runs the batch without the capture, from the same state and random state.
    """
    with torch.no_grad():
        first, second = plain().detach(), plain().detach()
    if first.shape == second.shape and torch.equal(first, second):
        return LossError(
            "loss_fn: gives other losses when it is run a second time, though two plain passes agree; it must not "
            "depend on how often it was called before (a count or a cache outside of the model's modules)"
        )
    return LossError(
        "loss_fn: gives other losses when it is run again on the same batch and random state; let the model "
        "draw from torch's, numpy's or Python's global generators, which are fixed per batch, not from its own, and "
        "keep no state outside of modules (their buffers and attributes are put back)"
    )


def not_finite_again(name: str, example: str, factor: float) -> LossError:
    """The error for gradients that were finite, and are not when losses are multiplied by up to ``factor``."""
    return LossError(
        f"loss_fn: the gradient of {name} for example {example} was finite and is NaN or infinite when the batch is "
        f"run again with losses multiplied by up to {factor:g}: it overflows {UNDERFLOW}; or something in the model or "
        "the loss keeps a state of its own from pass to pass"
    )


def not_finite(name: str, count: int, rows: int) -> LossError:
    """The error for gradients that are not finite in a batch whose rows' owners gradients have to tell."""
    return LossError(
        f"loss_fn: gradients are NaN or infinite in {count} of {rows} rows at {name}, though the losses are finite; "
        "whose they are cannot be told here, featurize in batches of one to find the example; look for a root or "
        "logarithm at zero in the model, or an overflow in half precision"
    )


def not_per_example(
    name: str, example: str, again: Callable[[float], Tensor], features: Tensor, tolerance: float, *, half: bool
) -> StepInfluenceError:
    """The error for features that do not scale with their own example's loss.

    Args:
        name: the parameter. example: the first that is concerned.
        again: the block's features with all losses multiplied by one factor.
        features: with factor 1.
        half: whether gradients in fp16 were seen.
    """
    for factor in (128.0, 1 / 128):
        found = again(factor)
        expected = features * factor
        if not bool(found.isfinite().all()):
            return LossError(f"loss_fn: the gradient of {name} overflows when losses are multiplied, {UNDERFLOW}")
        if float((found - expected).norm()) > tolerance * float(expected.norm()):
            return not_proportional(name, factor, half=half)
    return LayoutError(
        f"{name}: the gradient of example {example} changes with the losses of other "
        "examples of its batch; say which dimension holds the examples (batch_dim=), and use no operation "
        "that mixes them (batch normalisation in training mode)"
    )


def not_proportional(name: str, factor: float, *, half: bool) -> StepInfluenceError:
    """The error for a gradient that does not become ``factor`` times as large with all losses.

    Args:
        name: the parameter.
        half: whether gradients in fp16 were seen.
    """
    if half:
        return LossError(
            f"loss_fn: the gradient of {name} is not proportional to the loss: it underflows or overflows {UNDERFLOW}"
        )
    return UnsupportedUseError(
        f"{name}: its gradient is not proportional to the loss (all losses were multiplied by {factor:g}): "
        "something in the backward pass clips, rounds or normalises gradients (a hook on an activation, a "
        "custom autograd function); take that out while featurizing"
    )
