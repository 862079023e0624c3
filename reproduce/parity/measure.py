"""What a trained parity model shows in its forward pass: accuracy, answer-token trajectories, read-out states."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stepinfluence.models.parity import ParityTransformer
from stepinfluence.models.parity_task import (
    ParityExample,
    accuracy_by_length,
    alternating_probes,
    collate,
    make_heldout_set,
)

from reproduce.arrays import Array
from reproduce.parity.config import Config

CHUNK = 128
ORDERS = 4
"""Strings of each number of ones."""


def trajectories(model: ParityTransformer, examples: Sequence[ParityExample], steps: int) -> tuple[Array, Array]:
    """The answer position of each string after each of the loop steps 1 .. ``steps``.

    Args:
        model: on any device.
        examples: strings of fewer than ``steps`` bits.
        steps: loop steps run.

    Returns:
        Hidden states ``(n, steps, width)`` and logit differences "1" minus "0" ``(n, steps)``, float64.
    """
    device = next(model.parameters()).device
    hidden, difference = [], []
    for start in range(0, len(examples), CHUNK):
        batch = collate(examples[start : start + CHUNK], length=steps)
        path = model.answer_trajectory(batch["tokens"].to(device), batch["read_step"].to(device), steps)
        hidden.append(path.hidden.double().cpu().numpy())
        difference.append((path.logits[..., 1] - path.logits[..., 0]).double().cpu().numpy())
    return np.concatenate(hidden), np.concatenate(difference)


def read_out(model: ParityTransformer, examples: Sequence[ParityExample]) -> tuple[Array, NDArray[np.int64]]:
    """State at the answer position after the read-out step ``(n, width)``, and the model's answer ``(n,)``.

    An answer is the arg max over the whole vocabulary; anything but 0 and 1 is a wrong answer.
    """
    device = next(model.parameters()).device
    states, answers = [], []
    for start in range(0, len(examples), CHUNK):
        batch = {k: v.to(device) for k, v in collate(examples[start : start + CHUNK]).items()}
        path = model.answer_trajectory(batch["tokens"], batch["read_step"])
        rows = torch.arange(len(batch["read_step"]), device=device)
        states.append(path.hidden[rows, batch["read_step"] - 1].double().cpu().numpy())
        answers.append(path.logits[rows, batch["read_step"] - 1].argmax(-1).cpu().numpy())
    return np.concatenate(states), np.concatenate(answers)


def running_parity(examples: Sequence[ParityExample], steps: int, *, from_end: bool) -> NDArray[np.int64]:
    """Parity of the first, or last, t bits of each string, for t = 1 .. ``steps``: ``(n, steps)``."""
    bits = np.array([[int(b) for b in (e.bits[::-1] if from_end else e.bits)[:steps]] for e in examples])
    return np.asarray(bits.cumsum(1) % 2)


def forward(model: ParityTransformer, config: Config, train_set: Sequence[ParityExample], seed: int) -> dict[str, Any]:
    """Everything the forward pass is asked for, as arrays (a stage's result).

    Args:
        model: trained.
        config: the experiment.
        train_set: what it was trained on; held out strings are none of these.
        seed: of the strings drawn.

    Returns:
        With n the test length, T = n + 2: ``probe_hidden`` ``(2, T, width)`` and ``probe_difference`` ``(2, T)``;
        ``running_start``, ``running_end`` ``(n,)``: share of test strings whose logits after step t say the parity of
        the first, or last, t bits; ``count_ones``, ``count_right`` ``(strings,)``, ``count_difference`` ``(strings,
        T)``, ``count_cosine`` ``(strings,)``: see :func:`_by_count`; ``accuracy_lengths``, ``accuracy``
        ``(lengths,)``; and of the sets test and every (alternating strings up to ``beyond`` bits) ``_hidden``
        ``(strings, width)``, ``_parity``, ``_answers``, ``_lengths`` and ``_first``, the first bit, ``(strings,)``;
        ``calibration`` and ``evaluation`` are rows of every.
    """
    n = config.test_length
    found: dict[str, Any] = {}
    found["probe_hidden"], found["probe_difference"] = trajectories(model, alternating_probes(n), n + 2)
    every = [probe for length in range(2, config.beyond + 1) for probe in alternating_probes(length)]
    test = heldout_strings(config, train_set, seed)
    for name, examples in (("test", test), ("every", every)):
        found[f"{name}_hidden"], found[f"{name}_answers"] = read_out(model, examples)
        found[f"{name}_parity"] = np.array([e.parity for e in examples])
        found[f"{name}_lengths"] = np.array([e.n_digits for e in examples])
        found[f"{name}_first"] = np.array([int(e.bits[0]) for e in examples])
    found["calibration"] = alternating_rows(config.calibration, n, seed=seed + 3)
    found["evaluation"] = alternating_rows(config.evaluation, n, seed=seed + 4)
    some = test[: config.test_examples]
    says = trajectories(model, some, n + 2)[1][:, :n] > 0
    for name, from_end in (("running_start", False), ("running_end", True)):
        found[name] = (says == running_parity(some, n, from_end=from_end)).mean(0)
    found |= _by_count(model, n, seed + 5)
    by_length = accuracies(model, config, train_set, seed)
    found["accuracy_lengths"], found["accuracy"] = np.array(list(by_length)), np.array(list(by_length.values()))
    return found


def alternating_rows(count: int, longest: int, *, seed: int) -> NDArray[np.int64]:
    """Alternating strings of random length in 2 .. ``longest`` that begin with a random bit, with replacement (D.2).

    Returns:
        Their rows ``(count,)`` in the list of all alternating strings, two of each length from 2 on.
    """
    return np.random.default_rng(seed).integers(0, 2 * (longest - 1), count)


def _by_count(model: ParityTransformer, n: int, seed: int) -> dict[str, Any]:
    """Strings of ``n`` bits with every number of ones, four random orders of each.

    Returns:
        ``count_ones``; ``count_difference``, logit differences; ``count_right``, whether read out rightly; and
        ``count_cosine``, the cosine of the read-out states of a string and the next of as many ones in another order.
    """
    draw = random.Random(seed)
    ones = [k for k in range(n + 1) for _ in range(ORDERS)]
    strings = [ParityExample(i, "".join(draw.sample("1" * k + "0" * (n - k), n))) for i, k in enumerate(ones)]
    hidden, difference = trajectories(model, strings, n + 2)
    end = hidden[:, n - 1] / np.linalg.norm(hidden[:, n - 1], axis=1, keepdims=True)
    groups = end.reshape(-1, ORDERS, end.shape[1])
    return {
        "count_ones": np.array(ones),
        "count_difference": difference,
        "count_right": (difference[:, n - 1] > 0) == np.array([k % 2 for k in ones]),
        "count_cosine": (groups * np.roll(groups, 1, axis=1)).sum(2).ravel(),
    }


def heldout_strings(config: Config, train_set: Sequence[ParityExample], seed: int) -> list[ParityExample]:
    """Held-out strings of the test length; the first ``test_examples`` are those that are scored."""
    return make_heldout_set([config.test_length], config.accuracy_strings, exclude=train_set, seed=seed + 1)


def accuracies(
    model: ParityTransformer, config: Config, train_set: Sequence[ParityExample], seed: int
) -> dict[int, float]:
    """Accuracy on held-out strings by length, up to the test length.

    A quarter of ``accuracy_strings`` of each; short lengths of which the training set holds every string are measured
    on those.
    """
    top, few = config.training.max_digits, max(1, config.accuracy_strings // 4)
    lengths = [*range(1, top + 1), *range(top + 1, config.test_length, 4), config.test_length]
    held = make_heldout_set(lengths, few, exclude=train_set, seed=seed + 2)
    missing = set(lengths) - {e.n_digits for e in held}
    return accuracy_by_length(model, [*held, *(e for e in train_set if e.n_digits in missing)])
