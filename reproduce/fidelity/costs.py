"""Memory and time in the report of the fidelity experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from stepinfluence.models.gpt import LoopedGPTConfig

from reproduce.base import Comparison, Result
from reproduce.fidelity.config import Config
from reproduce.fidelity.memory import METHODS
from reproduce.fidelity.timing import EXACT, FORWARD, SDI, STEP, TRACIN

GPU_BYTES = 48 * 10**9
"""Memory of the paper's GPU (RTX A6000)."""


def cost_comparisons(
    config: Config, library: Result, timings: Result, searches: Mapping[str, Result], ratio: Mapping[str, float]
) -> tuple[Comparison, ...]:
    """The paper's and the summary's figures on cost, beside ours."""
    cpu = config.device == "cpu"
    seconds = timings["cpu" if cpu else "wall"]
    index = {name: k for k, name in enumerate(timings["names"])}
    added = seconds[index[SDI]] - seconds[index[FORWARD]]
    found = {name: s["feasible"] for name, s in searches.items()}
    where = "CPU" if cpu else "GPU"
    rows = []
    checkpointed = found.get("sketches, checkpointed")
    if found:
        limit = f"{config.memory.limit / 1e9:.1f} GB on the {where}"
        ceiling = f"; the search ends at {config.memory.ceiling}" if config.memory.ceiling in found.values() else ""
        rows.append(
            Comparison(
                "largest batch: full gradients → sketches",
                f"{found['full gradients']} → {found['sketches']}"
                + (f" ({checkpointed} with activation checkpointing)" if checkpointed is not None else ""),
                "4 → 40",
                "§4",
                f"{limit}, d = {config.memory.model.d_model}, {config.memory.model.steps} steps; paper: 48 GB{ceiling}",
            )
        )
    t = config.timing
    rows += [
        Comparison(
            "seconds added to an inference-only forward pass",
            f"{np.median(added):.2f} at batch {t.batch}, {t.model.steps} steps",
            "2.55 ± 0.002 at batch 40, 32 steps",
            "§4",
            "processor seconds of one CPU; paper: RTX A6000" if cpu else "paper: RTX A6000",
        ),
        Comparison("training and attribution over training alone, SDI", 1 + ratio[SDI], "1.3", "summary",
                   "every batch that is trained on is also attributed"),
        Comparison("training and attribution over training alone, classic TracIn", 1 + ratio[TRACIN], "1.9", "summary",
                   "full gradients, one example at a time"),
    ]  # fmt: skip
    return tuple(rows)


def cost_values(
    config: Config, library: Result, saved: int, timings: Result, searches: Mapping[str, Result]
) -> dict[str, Any]:
    """What the report says of memory and time: feasible batches, the arithmetic of the paper's GPU, medians."""
    found = []
    for name, result in searches.items():
        peaks = {int(b): p for b, p in result["attempts"]}
        feasible = result["feasible"]
        found.append(
            {"method": METHODS[name], "feasible": feasible, "peak": peaks.get(feasible), "tried": sorted(peaks)}
        )
    gradients, features = library["gradient_bytes"], library["feature_bytes"]
    budget = GPU_BYTES - 2 * 4 * library["parameters"]  # weights and one gradient of them, float32
    return {
        "is_paper": config.model == LoopedGPTConfig.paper(),
        "searches": found,
        "room": {
            "gradients": _arithmetic(budget, saved + gradients),
            "copied": _arithmetic(budget, saved + 2 * gradients),
            "sketches": _arithmetic(budget, saved + features),
        },
        "names": {"step": STEP, "sdi": SDI, "tracin": TRACIN, "exact": EXACT},
        "contestants": [
            {"name": name, "wall": np.median(timings["wall"][k]), "cpu": np.median(timings["cpu"][k])}
            for k, name in enumerate(timings["names"])
        ],
        "slowed": float(np.median(timings["wall"] / np.maximum(timings["cpu"], 1e-9))),
    }


def _arithmetic(budget: float, per_example: float) -> int:
    """Largest multiple of 4 examples within a budget of bytes."""
    return max(0, int(budget // per_example) // 4 * 4)
