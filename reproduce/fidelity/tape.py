"""A tape of the loop body's linear layers: exact scores and sketches of every kind from one pass over the model.

For a linear layer without bias the gradient through one loop step is ``phi_t = sum_l delta_l (x) a_l`` (paper, eq. 4).
Inputs ``a`` and backpropagated signals ``delta`` of all steps take ``B * steps * T * sum(d_in + d_out)`` numbers:
3.8 GB at the paper's size with four examples, where the gradients themselves take 15 GB. With them on tape, another
sketch costs only the sketching, so sizes, seeds and hash families can be compared on one backward pass.

Plain PyTorch hooks, sharing nothing with :mod:`stepinfluence.capture`: what the two have in common is checked, not
assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from stepinfluence.models.gpt import LoopedGPT, gpt_loss
from torch import Tensor, nn

from sdi_kernels import HashFamily, TensorSketch, sketch_linear_grads

STEPS_AT_ONCE = 4
"""Loop steps whose exact gradients are held at a time."""


@dataclass(frozen=True)
class Tape:
    """What the loop body's linear layers saw.

    Attributes:
        activations: per weight, float ``(B, steps, T, d_in)``.
        grad_outputs: per weight, ``(B, steps, T, d_out)``.
    """

    activations: Mapping[str, Tensor]
    grad_outputs: Mapping[str, Tensor]

    @property
    def examples(self) -> int:
        return len(next(iter(self.activations.values())))

    @property
    def steps(self) -> int:
        return next(iter(self.activations.values())).shape[1]


def record(model: LoopedGPT, batch: Mapping[str, Tensor]) -> Tape:
    """One forward pass and one backward pass for inputs, example by example so that one graph is alive at a time.

    Args:
        model: its loop body must consist of linear layers without bias, as nanochat's does.
        batch: ``tokens`` and ``targets``, ``(B, T)``, on the model's device.

    Raises:
        ValueError: the body has parameters of another kind.
    """
    layers = {f"core.{n}.weight": m for n, m in model.core.named_modules() if isinstance(m, nn.Linear)}
    others = sorted({f"core.{n}" for n, _ in model.core.named_parameters()} - layers.keys())
    if others:
        raise ValueError(f"model: {others[0]} is no weight of a linear layer; use norms and layers without parameters")
    examples, tokens = batch["tokens"].shape
    steps, like = model.config.steps, next(iter(layers.values())).weight

    def empty(width: int) -> Tensor:
        return torch.zeros(examples, steps, tokens, width, dtype=like.dtype, device=like.device)

    activations = {name: empty(layer.in_features) for name, layer in layers.items()}
    grads = {name: empty(layer.out_features) for name, layer in layers.items()}
    example, step = 0, -1

    def enter(_module: nn.Module, _inputs: Any) -> None:
        nonlocal step
        step += 1

    def keep(name: str, inputs: Tensor, output: Tensor) -> None:
        activations[name][example, step] = inputs[0].detach()
        place = grads[name][example, step]

        def take(gradient: Tensor) -> None:
            place.copy_(gradient[0])

        output.register_hook(take)

    handles = [model.core.register_forward_pre_hook(enter)]
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda _m, args, out, name=name: keep(name, args[0], out)))
    try:
        for example in range(examples):
            step = -1
            loss = gpt_loss(model, {key: value[example : example + 1] for key, value in batch.items()}).sum()
            # To the embedding only: the way there leads through every layer of the loop, and forms no weight gradient.
            torch.autograd.grad(loss, [model.embedding.weight])
    finally:
        for handle in handles:
            handle.remove()
    return Tape(activations, grads)


def exact_sdi(tape: Tape) -> Tensor:
    """Exact test-step SDI ``<grad(z), phi_t(z')>`` (paper, eq. 5) of all pairs, ``(B, B, steps)`` float64."""
    result = torch.zeros(tape.examples, tape.examples, tape.steps, dtype=torch.float64)
    chunks = range(0, tape.steps, STEPS_AT_ONCE)

    def phi(name: str, example: int, first: int) -> Tensor:
        part = slice(first, first + STEPS_AT_ONCE)
        delta, a = tape.grad_outputs[name][example, part], tape.activations[name][example, part]
        return torch.bmm(delta.transpose(1, 2), a).flatten(1)  # (steps, d_out * d_in)

    for name in tape.activations:
        total = torch.stack([sum(phi(name, z, t).sum(0) for t in chunks) for z in range(tape.examples)])  # type: ignore[misc]  # never the int 0 alone
        for query in range(tape.examples):
            for first in chunks:
                scores = total @ phi(name, query, first).T
                result[:, query, first : first + STEPS_AT_ONCE] += scores.cpu().double()
    return result


def sketch(tape: Tape, name: str, size: int, hashing: HashFamily, seed: int) -> Tensor:
    """TensorSketches of one weight's step gradients, ``(B, steps, m)``: what :func:`stepinfluence.attach` gives."""
    a, delta = tape.activations[name], tape.grad_outputs[name]
    tables = TensorSketch(delta.shape[-1], a.shape[-1], size, seed=seed, name=name, hashing=hashing)
    return sketch_linear_grads(a, delta, tables)


def sketched_sdi(tape: Tape, size: int, hashing: HashFamily, seed: int) -> Tensor:
    """Sketched SDI of all pairs, ``(B, B, steps)`` float64: one independent sketch per weight, concatenated."""
    result = torch.zeros(tape.examples, tape.examples, tape.steps, dtype=torch.float64)
    for name in tape.activations:
        phi = sketch(tape, name, size, hashing, seed)
        result += torch.einsum("nd,qtd->nqt", phi.sum(1), phi).cpu().double()
    return result
