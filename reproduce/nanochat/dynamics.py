"""How a trained loop treats its own state: what the adapter lets in, and how fast changes of the state die out."""

from __future__ import annotations

import copy

import torch
from stepinfluence.models.gpt import LoopedGPT
from torch import Tensor

from reproduce.nanochat.corpus import Batch

SETTLE = 4
"""Loop steps before the state is disturbed."""


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
