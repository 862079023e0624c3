"""The largest batch that fits into a memory limit, each attempt in a process of its own.

On the CPU: peak resident memory of the process above what the imports take (Linux, which can tell). On a GPU: the
limit is set for the process, and running out of memory is what stops the search, as in the paper.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from stepinfluence.capture import ExactCapture, attach
from stepinfluence.errors import StepInfluenceError
from stepinfluence.machine import PeakMemory
from stepinfluence.models.gpt import LoopedGPT, LoopedGPTConfig, gpt_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reproduce.fidelity.config import MemoryConfig
from reproduce.fidelity.measure import make_model, random_batch

METHODS = {
    "training step": "plain forward and backward pass",
    "full gradients": "per-example gradients of every step (ExactCapture)",
    "sketches": "sketch during backpropagation",
    "sketches, checkpointed": "the same, with activation checkpointing of each loop step",
}


@dataclass(frozen=True)
class Attempt:
    """One process: ``bytes`` at its peak; None where it ran out of memory."""

    batch: int
    bytes: int | None


@dataclass(frozen=True)
class Search:
    """Largest feasible batch (0 if not even the smallest fits), and every attempt made."""

    feasible: int
    attempts: tuple[Attempt, ...]


def largest_feasible(fits: Callable[[int], bool], *, step: int, ceiling: int) -> int:
    """The largest multiple of ``step`` that fits, up to ``ceiling``; 0 if none does.

    Doubles until something does not fit and bisects from there: the same answer as going up step by step, as what fits
    at some batch fits at every smaller one.
    """
    low, high, top = 0, 1, ceiling // step  # in units of step; low fits, high is next
    while high <= top and fits(high * step):
        low, high = high, 2 * high
    high = min(high, top + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle
    return low * step


def search(config: MemoryConfig, method: str, *, seed: int, device: str) -> Search:
    """Run attempts in child processes until the largest feasible batch is known.

    Raises:
        StepInfluenceError: a child failed, or this system does not tell a process's peak memory.
    """
    attempts: list[Attempt] = []

    def fits(batch: int) -> bool:
        attempts.append(_attempt_in_child(config, method, batch, seed=seed, device=device))
        used = attempts[-1].bytes
        return used is not None and used <= config.limit

    feasible = largest_feasible(fits, step=config.step, ceiling=config.ceiling)
    return Search(feasible, tuple(attempts))


def measurable(device: str) -> bool:
    """Whether peak memory can be measured here."""
    return device == "cuda" or PeakMemory().peak_bytes() is not None


def _attempt_in_child(config: MemoryConfig, method: str, batch: int, *, seed: int, device: str) -> Attempt:
    request = {
        "model": asdict(config.model), "method": method, "batch": batch, "seed": seed, "device": device,
        "limit": config.limit, "threads": torch.get_num_threads(),
    }  # fmt: skip
    # Large blocks go back to the system when freed (glibc): what is resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "reproduce.fidelity.memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StepInfluenceError(f"memory: a process with {method}, batch {batch} failed: {last}")
    return Attempt(batch, json.loads(done.stdout.splitlines()[-1])["bytes"])


class CheckpointedCore(nn.Module):
    """A loop body that keeps only its inputs and is run again in the backward pass."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs: Any) -> Tensor:
        return checkpoint(self.body, *inputs, use_reentrant=False)  # type: ignore[no-any-return]  # untyped in torch


def work(model: LoopedGPT, batch: dict[str, Tensor], method: str) -> None:
    """What a method does with one batch, all results held at the end."""
    if method == "training step":
        gpt_loss(model, batch).mean().backward()
        return
    body: nn.Module = model.core
    if method == "sketches, checkpointed":
        model.core = CheckpointedCore(body)  # type: ignore[assignment]  # called as the body is
    if method == "full gradients":
        ExactCapture(model, body=body).featurize([batch], gpt_loss, progress=False)
    else:
        attach(model, body=body, verify=False).featurize([batch], gpt_loss, progress=False)


def peak_bytes(request: dict[str, Any]) -> int | None:
    """Peak memory of this process for the request; None if a GPU ran out of it.

    Raises:
        StepInfluenceError: this system does not tell.
    """
    torch.set_num_threads(request["threads"])
    config, device = LoopedGPTConfig(**request["model"]), request["device"]
    cuda = device == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, request["limit"] / total))
    meter = PeakMemory()
    before = meter.peak_bytes()
    try:
        model = make_model(config, seed=request["seed"], device=device)
        batch = random_batch(config, request["batch"], seed=request["seed"], device=device)
        work(model, batch, request["method"])
    except torch.OutOfMemoryError:
        return None
    if cuda:
        return torch.cuda.max_memory_allocated()
    after = meter.peak_bytes()
    if before is None or after is None:
        raise StepInfluenceError("memory: this system does not tell a process's peak memory; run this part on Linux")
    return after - before


if __name__ == "__main__":
    print(json.dumps({"bytes": peak_bytes(json.loads(sys.argv[1]))}))
