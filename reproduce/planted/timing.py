"""When does influence act, and when does the state change? Linear probes and energy profiles of one model."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reproduce.arrays import Array, Integers
from reproduce.planted.config import Config
from reproduce.planted.measure import energy
from reproduce.planted.model import LoopedRewriter
from reproduce.planted.planting import Distinct, Examples, clean
from reproduce.planted.tasks.step_task import StepTask
from reproduce.planted.training import accuracy_of, answer_loss, every_step_loss, to_model, train


def profiles(task: StepTask, config: Config, *, taught: bool) -> dict[str, Any]:
    """Train a model on right answers only; its energy and decoded changes for held-out queries.

    Args:
        task: what to learn.
        config: sizes.
        taught: train the read-out of every step to show the algorithm's state after that step, so that the step at
            which a swap or a carry is made is known; otherwise only the answer after the last step is trained.

    Returns:
        ``energy``, ``decoded`` and ``known`` changes, each ``(queries, steps)``; ``probe_answer`` and ``probe_state``
        ``(steps + 1,)``, accuracy of linear probes for the answer and for the algorithm's state of that step, from the
        embedded input (first entry) and from the state after each loop step; ``position_accuracy``,
        ``answer_accuracy`` of the model.
    """
    draw = Distinct(task, torch.Generator().manual_seed(config.seed + 2**33))  # not the planted data's stream
    examples, queries = clean(task, draw(config.examples)), clean(task, draw(config.plain_queries))
    loss = every_step_loss(task) if taught else answer_loss(task)
    steps = config.taught_steps if taught else config.train_steps
    model, _ = train(task, examples, config, loss=loss, seed=config.seed, steps=steps)
    position, whole = accuracy_of(model, task, queries)
    some = examples[: config.energy_examples]
    found = energy(model, some, queries, train_loss=loss, query_loss=answer_loss(task))
    answer, answer_right = decode(model, task, examples, queries, state=False)
    state, state_right = decode(model, task, examples, queries, state=True)
    # A taught model shows states; an untaught one is only known to work towards the answer.
    decoded = torch.from_numpy(state if taught else answer)
    return {
        "energy": found.double().numpy(),
        "decoded": (decoded[:, 1:] != decoded[:, :-1]).sum(2).numpy(),
        "known": task.changes(queries.states).numpy(),
        "probe_answer": answer_right,
        "probe_state": state_right,
        "position_accuracy": position,
        "answer_accuracy": whole,
    }


def decode(
    model: LoopedRewriter, task: StepTask, examples: Examples, queries: Examples, *, state: bool
) -> tuple[Integers, Array]:
    """What linear probes read from the queries after each step; one probe for each step, shared by all positions.

    Args:
        model: trained.
        task: for its answer positions.
        examples: what the probes are fitted on.
        queries: what they are read on.
        state: fit them to the algorithm's state after the same number of steps; otherwise to the answer.

    Returns:
        Values ``(queries, steps + 1, positions)`` and the probes' accuracy on the queries ``(steps + 1,)``. The first
        entry of each is read from the embedded input, before any step.
    """
    place = slice(task.answer_positions.start, task.answer_positions.stop)
    fit_on, read_on = _hidden(model, examples)[:, :, place], _hidden(model, queries)[:, :, place]
    values, right = [], []
    for step in range(fit_on.shape[1]):
        at = step if state else -1
        targets, truth = (part.states[:, at, place].numpy() for part in (examples, queries))
        read = _probe(fit_on[:, step].reshape(-1, fit_on.shape[-1]), targets.ravel(), read_on[:, step])
        values.append(read)
        right.append(float((read == truth).mean()))
    return np.stack(values, 1), np.array(right)


def _probe(features: Array, targets: Integers, read_on: Array) -> Integers:
    if len(np.unique(targets)) == 1:  # empty slots, before the first step
        return np.full(read_on.shape[:2], targets[0])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=10.0, max_iter=200))
    with warnings.catch_warnings():
        # Separable data have no optimum: the iterations end where they are told to.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features, targets)
    read: Integers = probe.predict(read_on.reshape(-1, read_on.shape[-1])).reshape(read_on.shape[:2])
    return read


@torch.no_grad()
def _hidden(model: LoopedRewriter, examples: Examples) -> Array:
    """``(N, steps + 1, tokens, d_model)``: the embedded input, then the state after each step."""
    parts = []
    for batch in examples.batches(512):
        tokens = to_model(batch, model)["tokens"]
        parts.append(torch.stack([model.embed(tokens), *model.hidden(tokens)], 1).double().cpu())
    return torch.cat(parts).numpy()
