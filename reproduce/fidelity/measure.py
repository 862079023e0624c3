"""The scores that are compared: exact, sketched at every size and seed, and as the library itself computes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from stepinfluence.capture import attach
from stepinfluence.errors import StepInfluenceError
from stepinfluence.models.gpt import LoopedGPT, LoopedGPTConfig, gpt_loss
from torch import Tensor

from reproduce.fidelity.config import Config
from reproduce.fidelity.statistics import relative_error
from reproduce.fidelity.tape import Tape, exact_sdi, record, sketch, sketched_sdi
from sdi_kernels import HashFamily, TensorSketch, sketch_matrix_grads

AGREEMENT = 1e-4
"""Largest relative difference between the library's features and the tape's: the rounding of float32 sums."""


def make_model(config: LoopedGPTConfig, *, seed: int, device: str = "cpu") -> LoopedGPT:
    """A model with random weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoopedGPT(config).to(device).eval()


def random_batch(config: LoopedGPTConfig, examples: int, *, seed: int, device: str = "cpu") -> dict[str, Tensor]:
    """Uniformly random tokens and targets, ``(B, T)`` each (paper, D.1)."""
    generator = torch.Generator().manual_seed(seed + 2**32)  # not the stream that made the weights
    shape = (examples, config.sequence_len)
    return {
        key: torch.randint(0, config.vocab_size, shape, generator=generator).to(device) for key in ("tokens", "targets")
    }


class Scores:
    """Model, batch and tape of a run, each made when first needed: finished stages need none of them."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def model(self) -> LoopedGPT:
        return make_model(self.config.model, seed=self.config.seed, device=self.config.device)

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        return random_batch(self.config.model, self.config.batch, seed=self.config.seed, device=self.config.device)

    @cached_property
    def tape(self) -> Tape:
        return record(self.model, self.batch)

    def exact(self) -> dict[str, Any]:
        """``sdi``: exact test-step SDI, ``(B, B, steps)``."""
        return {"sdi": exact_sdi(self.tape).numpy()}

    def sketched(self, hashing: HashFamily, announce: Callable[[str], None]) -> dict[str, Any]:
        """``sdi``: sketched SDI, ``(sizes, seeds, B, B, steps)``."""
        rows = []
        for size in self.config.sketch_sizes:
            announce(f"{hashing} hashing, m = {size}")
            seeds = range(self.config.seed, self.config.seed + self.config.sketch_seeds)
            rows.append(np.stack([sketched_sdi(self.tape, size, hashing, s).numpy() for s in seeds]))
        return {"sdi": np.stack(rows)}

    def library(self) -> dict[str, Any]:
        """The library's own features against the tape's, and conservation against plain autograd (paper, D.1).

        Raises:
            StepInfluenceError: they disagree; no number of this run could be trusted.
        """
        config, count = self.config, self.config.checked_examples
        batch = {key: value[:count] for key, value in self.batch.items()}
        capture = attach(self.model, body="core", sketch_size=config.reference_size, seed=config.seed)
        features = capture.featurize([batch], gpt_loss, progress=False)
        difference = 0.0
        for block in features.space.blocks:
            want = sketch(self.tape, block.name, config.reference_size, "balanced", config.seed)[:count]
            found = features.values[..., block.start : block.stop]
            difference = max(difference, relative_error(found.cpu().numpy(), want.cpu().numpy()))
        if not difference <= AGREEMENT:
            raise StepInfluenceError(
                f"fidelity: the library's features differ from sketches of recorded activations by {difference:.2g} "
                f"(limit {AGREEMENT:g}); please report this with your versions"
            )
        absolute, relative = self._conservation(features.values, [b.name for b in features.space.blocks])
        return {
            "feature_difference": difference,
            "conservation_max_abs": absolute,
            "conservation_relative": relative,
            "feature_bytes": features.values.element_size() * features.values[0].numel(),
            "gradient_bytes": 4 * sum(p.numel() for p in self.model.core.parameters()) * self.model.config.steps,
            "body_parameters": sum(p.numel() for p in self.model.core.parameters()),
            "body_tensors": len(list(self.model.core.parameters())),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def _conservation(self, values: Tensor, names: list[str]) -> tuple[float, float]:
        """Sketch of autograd's whole gradient against the sum of step sketches: largest absolute and relative
        difference over examples and weights."""
        parameters = [self.model.get_parameter(name) for name in names]
        size = self.config.reference_size
        absolute = relative = 0.0
        for row in range(len(values)):
            loss = gpt_loss(self.model, {key: value[row : row + 1] for key, value in self.batch.items()}).sum()
            grads = torch.autograd.grad(loss, parameters)
            for k, (name, grad) in enumerate(zip(names, grads, strict=True)):
                direct = sketch_matrix_grads(
                    grad, TensorSketch(grad.shape[0], grad.shape[1], size, seed=self.config.seed, name=name)
                )
                summed = values[row, :, k * size : (k + 1) * size].sum(0)
                absolute = max(absolute, float((summed - direct).abs().max()))
                relative = max(relative, float((summed - direct).norm() / direct.norm()))
        return absolute, relative


def saved_bytes_per_example(config: LoopedGPTConfig, *, seed: int) -> int:
    """Bytes that autograd keeps for the backward pass of one example: parameters and shared storages counted once."""
    model = make_model(config, seed=seed)
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = gpt_loss(model, random_batch(config, 1, seed=seed))
    del loss
    return sum(sizes.values())
