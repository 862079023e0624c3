"""What is measured of a trained looped language model: influence by loop step, loss at each loop count, how its loop
treats its own state: what the adapter lets in, and how fast changes of the state die out."""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from stepinfluence.attribution.checkpoints import load_checkpoint
from stepinfluence.attribution.curvature import Fisher
from stepinfluence.attribution.scoring import influence
from stepinfluence.attribution.visiting import visit_checkpoints
from stepinfluence.capture import attach
from stepinfluence.models.gpt import LoopedGPT
from torch import Tensor

from reproduce.nanochat.config import Config, Variant
from reproduce.nanochat.corpus import Batch, Corpus, batches
from reproduce.nanochat.training import at_depth, make_model

SETTLE = 4
"""Loop steps before the state is disturbed."""


def influence_by_step(
    config: Config, variant: Variant, corpus: Corpus, paths: list[Path], steps: int
) -> dict[str, Any]:
    """Influence summed over the checkpoints that this loop count takes, with their learning rates.

    Returns:
        ``sdi``: float32 ``(N, Q, steps)``; ``by_checkpoint``: the sum of absolute influence of each checkpoint and
        step, ``(K, steps)``; ``checkpoints``: their file names. With a curvature, ``corrected`` and
        ``corrected_by_checkpoint`` are the same of corrected scores; ``dampings``: relative, one each.
    """
    model = make_model(config, variant)
    capture = attach(model, body="core", sketch_size=config.sketch_size, seed=config.seed)
    train, query = (batches(rows, config.score_batch, config.device) for rows in corpus.examples())
    chosen, loss_fn = checkpoints_at(config, paths, steps), at_depth(steps)
    plain: list[Tensor] = []
    corrected: list[Tensor] = []
    dampings: list[float] = []
    with closing(visit_checkpoints(capture, chosen, "optimizer")) as etas:
        for eta in etas:
            rows = capture.featurize(train, loss_fn, per_step=False, progress=False)
            asked = capture.featurize(query, loss_fn, progress=False)
            plain.append(influence(rows, asked, etas=eta).sdi)
            if config.curvature:
                fisher = Fisher.fit(rows)
                dampings.append(fisher.damping)
                corrected.append(influence(rows, asked, etas=eta, curvature=fisher).sdi)
    found: dict[str, Any] = {"checkpoints": [path.name for path in chosen], **_added("sdi", "by_checkpoint", plain)}
    if config.curvature:
        found |= {"dampings": dampings, **_added("corrected", "corrected_by_checkpoint", corrected)}
    return found


def _added(total: str, each: str, parts: list[Tensor]) -> dict[str, Any]:
    return {
        total: torch.stack(parts).sum(0).cpu().numpy(),
        each: torch.stack([part.abs().sum((0, 1)) for part in parts]).cpu().numpy(),
    }


def checkpoints_at(config: Config, paths: list[Path], steps: int) -> list[Path]:
    """Every ``stride``-th checkpoint up to the last; all of them at the loop counts that are to be dense."""
    return paths if steps in config.dense else paths[:: -config.stride][::-1]


@torch.no_grad()
def loss_by_depth(config: Config, variant: Variant, corpus: Corpus, path: Path) -> dict[str, Any]:
    """``loss``: of the queries, in nats per token, at each loop count up to the largest horizon, at one checkpoint."""
    model, parts = load(config, variant, path), batches(corpus.examples()[1], config.score_batch, config.device)
    found = []
    for steps in range(1, max(config.horizons) + 1):
        losses = torch.cat([at_depth(steps)(model, part) for part in parts])
        found.append(float(losses.mean()))
    return {"loss": found}


def dynamics_of(config: Config, variant: Variant, corpus: Corpus, path: Path) -> dict[str, float]:
    """:func:`dynamics` of a checkpoint on the first batch of the queries."""
    rows = batches(corpus.examples()[1], config.score_batch, "cpu")[0]
    return dynamics(load(config, variant, path), rows, seed=config.seed)


def load(config: Config, variant: Variant, path: Path) -> LoopedGPT:
    """The model at a checkpoint."""
    model = make_model(config, variant).eval()
    load_checkpoint(path).load_into(model)
    return model


@torch.no_grad()
def dynamics(model: LoopedGPT, rows: Batch, *, seed: int) -> dict[str, float]:
    """Disturb the state after a few loop steps and follow the disturbance.

    Args:
        model: with an injection adapter.
        rows: ``tokens``, ``(B, T)``.
        seed: of the disturbance.

    Returns:
        ``contraction``: factor by which one application of the core changes a small disturbance, geometric mean of the
        second and third application (the first turns the disturbance into directions that matter). In float64, as
        contractions by a hundred a step leave nothing of float32. ``state_over_input``: size (Frobenius norm) of what
        the adapter makes of the state, over what it makes of the prelude output.
    """
    model = copy.deepcopy(model).cpu().double().eval()
    rotary = (model.rotary_cos, model.rotary_sin)
    injected: Tensor = model.embedding_norm(model.embedding(rows["tokens"].cpu()))
    for block in model.prelude:
        injected = block(injected, rotary)
    state = injected if model.config.initial_state == "prelude" else torch.zeros_like(injected)
    for _ in range(SETTLE):
        state = model.core(state, injected, rotary)
    d = model.config.d_model
    weight = model.core.adapter.weight
    ratio = (state @ weight[:, :d].T).norm() / (injected @ weight[:, d:].T).norm()
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(seed), dtype=state.dtype)
    other = state + 1e-6 * state.norm() / noise.norm() * noise
    sizes = []
    for _ in range(3):
        state, other = model.core(state, injected, rotary), model.core(other, injected, rotary)
        sizes.append(float((other - state).norm()))
    return {"contraction": (sizes[2] / sizes[0]) ** 0.5, "state_over_input": float(ratio)}
