"""What attribution costs next to what it is compared with, contestants alternating in every round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from stepinfluence.attribution.scoring import influence
from stepinfluence.capture import ExactCapture, attach
from stepinfluence.models.gpt import LoopedGPT, gpt_loss
from torch import Tensor

from reproduce.fidelity.config import TimingConfig
from reproduce.fidelity.measure import make_model, random_batch

FORWARD, STEP, SDI = "forward pass, inference only", "training step", "SDI by sketches"
TRACIN, EXACT = "TracIn by full gradients", "SDI by full gradients, one example"


def classic_tracin(model: LoopedGPT, batch: dict[str, Tensor]) -> Tensor:
    """TracIn ``(B, B)`` as it is usually computed: a gradient of the whole body per example, and their dot products."""
    parameters = list(model.core.parameters())
    rows = []
    for k in range(len(batch["tokens"])):
        loss = gpt_loss(model, {key: value[k : k + 1] for key, value in batch.items()}).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    gradients = torch.stack(rows)
    return gradients @ gradients.T


def contestants(config: TimingConfig, *, seed: int, device: str) -> dict[str, Callable[[], object]]:
    """Name -> one unit of work on the same batch."""
    model = make_model(config.model, seed=seed, device=device)
    batch = random_batch(config.model, config.batch, seed=seed, device=device)
    one = {key: value[:1] for key, value in batch.items()}
    capture = attach(model, body="core", seed=seed, verify=False)
    exact = ExactCapture(model, body="core")

    def forward() -> None:
        with torch.no_grad():
            gpt_loss(model, batch)

    def training_step() -> None:
        model.zero_grad()
        gpt_loss(model, batch).mean().backward()

    def sdi() -> object:
        features = capture.featurize([batch], gpt_loss, progress=False)
        return influence(features, features).tracin

    def tracin() -> object:
        model.zero_grad()  # a training step's gradients are no part of this
        return classic_tracin(model, batch)

    def exact_sdi() -> object:
        features = exact.featurize([one], gpt_loss, progress=False)
        return influence(features, features).tracin

    return {FORWARD: forward, STEP: training_step, SDI: sdi, TRACIN: tracin, EXACT: exact_sdi}


def measure(config: TimingConfig, *, seed: int, device: str) -> dict[str, Any]:
    """``wall`` and ``cpu`` seconds, ``(contestants, rounds)``, and the ``names`` of the rows.

    Every contestant runs once before the clock starts.
    """
    units = contestants(config, seed=seed, device=device)
    for run in units.values():
        run()
    wall = np.zeros((len(units), config.rounds))
    cpu = np.zeros_like(wall)
    for k in range(config.rounds):
        for row, run in enumerate(units.values()):
            _synchronize(device)
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            _synchronize(device)
            wall[row, k], cpu[row, k] = time.perf_counter() - start, time.process_time() - start_cpu
    return {"names": list(units), "wall": wall, "cpu": cpu}


def ratios(seconds: np.ndarray, names: Sequence[str], to: str) -> dict[str, float]:
    """Median over rounds of every contestant's seconds over those of ``to``, by name."""
    base = seconds[list(names).index(to)]
    return {name: float(np.median(row / base)) for name, row in zip(names, seconds, strict=True)}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
