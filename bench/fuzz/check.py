"""One model, judged: right, refused, or wrong."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import torch
from stepinfluence import Capture, ExactCapture, StepInfluenceError, attach
from torch import Tensor, nn

from bench.fuzz.build import build, loss_fn
from bench.fuzz.oracle import Oracle, Truth
from bench.fuzz.spec import Spec
from sdi_kernels import CountSketch, TensorSketch, reference

TOLERANCE = 1e-9
"""Largest allowed error, relative to the largest gradient norm in the example's batch (all is float64)."""

SKETCH_SIZE = 16
LARGEST = 1e6
"""Models with larger losses or gradients are drawn again: their rounding errors would need a bound of their own."""


@dataclass
class Outcome:
    """``verdict`` of one capture on one model, with the reason of a refusal or the size of an error.

    Verdicts: ``right``; ``refused`` (an error of the library's own); ``crashed`` (any other exception); ``wrong``;
    ``accepted`` (wrong, too: features of a model that mixes examples); ``rejected`` (such a model was refused, as it
    must be); ``discarded`` (not a case: see ``reason``).
    """

    verdict: str
    reason: str = ""
    error: float = 0.0

    @property
    def bad(self) -> bool:
        return self.verdict in ("wrong", "accepted")


def judge(spec: Spec, *, exact: bool = True, verify: bool = True) -> dict[str, Outcome]:
    """Outcomes by capture: ``sketched`` (:func:`stepinfluence.attach`), ``inline`` (its training steps) and, if asked
    for, ``exact``.

    The last is left out where examples are mixed, which it does not claim to notice.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, body, batches = build(spec)
        model.recompute = False
        try:
            truth = Oracle(model, body)(batches, loss_fn)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return {"sketched": Outcome("discarded", f"autograd on one example fails: {reason_of(error)}")}
        model.recompute = True
        unfit = reason_to_discard(spec, truth)
        if unfit:
            return {"sketched": Outcome("discarded", unfit)}
        found = {"sketched": sketched(spec, model, body, batches, truth, verify), "inline": inline(spec, truth)}
        if exact and not spec.mixes:
            found["exact"] = exactly(spec, model, body, batches, truth)
        return found


def reason_to_discard(spec: Spec, truth: Truth) -> str:
    """Why a model is not a case; empty if it is one."""
    if not bool(torch.isfinite(truth.gradients).all() & torch.isfinite(truth.losses).all()):
        return "not finite"
    if float(truth.gradients.abs().max()) > LARGEST or float(truth.losses.abs().max()) > LARGEST:
        return "too large"
    if not bool((truth.gradients != 0).any()):
        return "no gradient"
    differs = not torch.allclose(truth.losses, truth.together, rtol=1e-9, atol=1e-9)
    if differs != spec.mixes:
        return "examples do not mix" if spec.mixes else "examples mix"
    return ""


def sketched(
    spec: Spec, model: nn.Module, body: list[nn.Module], batches: list[Tensor], truth: Truth, verify: bool
) -> Outcome:
    try:
        capture = attach(model, body=body, sketch_size=SKETCH_SIZE, training=spec.training, verify=verify)
        features = capture.featurize(batches, loss_fn, progress=False, per_step=not spec.summed)
    except Exception as error:
        return refusal(spec, error)
    if spec.mixes:
        return Outcome("accepted")
    return compared(spec, features.values, truth.gradients @ sketching(capture, truth), batches)


def inline(spec: Spec, truth: Truth) -> Outcome:
    """A training step on each batch, of a model as it was made: nothing puts its buffers back."""
    rows: list[Tensor] = []
    try:
        for k in range(len(spec.batches)):
            model, body, batches = build(spec)
            model.recompute = True
            model.train(spec.training)
            capture = attach(model, body=body, sketch_size=SKETCH_SIZE)
            with capture.inline(batches[k], per_step=True) as step:
                step.losses(loss_fn(model, batches[k])).mean().backward()
            rows.append(step.features.values)
    except Exception as error:
        return refusal(spec, error)
    if spec.mixes:
        return Outcome("accepted")
    steps = max(r.shape[1] for r in rows)
    found = torch.cat([nn.functional.pad(r, (0, 0, 0, steps - r.shape[1])) for r in rows])
    return compared(spec, found.sum(1) if spec.summed else found, truth.gradients @ sketching(capture, truth), batches)


def exactly(spec: Spec, model: nn.Module, body: list[nn.Module], batches: list[Tensor], truth: Truth) -> Outcome:
    try:
        capture = ExactCapture(model, body=body, training=spec.training)
        features = capture.featurize(batches, loss_fn, progress=False, per_step=not spec.summed)
    except Exception as error:
        return refusal(spec, error)
    assert [block.name for block in features.space.blocks] == truth.names
    return compared(spec, features.values, truth.gradients, batches)


def sketching(capture: Capture, truth: Truth) -> Tensor:
    """``(P, D)``: what the capture's sketches do to the gradients, from their definitions."""
    assert [t.name for t in capture.targets] == truth.names
    blocks = []
    for target in capture.targets:
        sketch = target.sketch
        units = torch.eye(target.parameter.numel(), dtype=torch.float64)
        if isinstance(sketch, TensorSketch):
            blocks.append(reference.tensor_sketch(units.view(-1, sketch.d_out, sketch.d_in), sketch))
        else:
            assert isinstance(sketch, CountSketch)
            blocks.append(reference.count_sketch(units, sketch))
    return torch.block_diag(*blocks)  # type: ignore[no-any-return]


def compared(spec: Spec, found: Tensor, expected: Tensor, batches: list[Tensor]) -> Outcome:
    """``(N, steps, D)`` (or, summed, ``(N, D)``) of a capture against ``(N, steps, D)`` of the oracle.

    Either may have more steps at the end, of zeros.
    """
    if spec.summed:
        found, expected = found.unsqueeze(1), expected.sum(1, keepdim=True)
    steps = max(found.shape[1], expected.shape[1])
    a, b = (torch.cat([v, v.new_zeros(len(v), steps - v.shape[1], v.shape[2])], 1) for v in (found, expected))
    worst = 0.0
    for x, y in zip(*(v.split([len(batch) for batch in batches]) for v in (a, b)), strict=True):
        largest = float(y.norm(dim=2).max())
        error = float((x - y).norm(dim=2).max())
        worst = max(worst, error / largest if largest else error)
    return Outcome("right", error=worst) if worst <= TOLERANCE else Outcome("wrong", error=worst)


def refusal(spec: Spec, error: Exception) -> Outcome:
    if spec.mixes and isinstance(error, StepInfluenceError):
        return Outcome("rejected", reason_of(error))
    return Outcome("refused" if isinstance(error, StepInfluenceError) else "crashed", reason_of(error))


def reason_of(error: Exception) -> str:
    """An error's class and the beginning of its message, without names and numbers that differ from model to model."""
    text = str(error).split("\n")[0]
    text = re.sub(r"\b(blocks|core)\.[\w.]+(, blocks\.[\w.]+)*( and \d+ more)?", "NAME", text)
    text = re.sub(r"\d+", "#", re.sub(r"\((#|\d+|, |'\.\.\.'|\.\.\.)+\)", "(SHAPE)", text))
    return f"{type(error).__name__}: {text[:110]}"
