"""Memory and time in the report of the fidelity experiment."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from stepinfluence.models.gpt import LoopedGPTConfig

from reproduce.base import Comparison, Result, Section
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


def memory_section(config: Config, library: Result, saved: int, searches: Mapping[str, Result]) -> Section:
    """Feasible batches as measured, and the arithmetic at the size of the model that was scored."""
    lines = []
    if searches:
        m = config.memory
        what = "resident memory above the imports" if config.device == "cpu" else "memory on the GPU"
        lines += [
            (
                f"Largest batch (multiples of {m.step}) whose peak {what} stays below {m.limit / 1e9:.2f} GB, for a "
                f"looped GPT of width {m.model.d_model} with {m.model.steps} loop steps and {m.model.sequence_len} "
                "tokens, m = 2048. Each attempt is a process of its own; the times below leave theirs out."
            ),
            "",
            "| method | largest batch | peak at that batch, MB | attempts |",
            "|---|---|---|---|",
        ]
        for name, result in searches.items():
            peaks = {int(b): p for b, p in result["attempts"]}
            peak = peaks.get(result["feasible"])
            shown = "–" if peak is None else f"{peak / 1e6:.0f}"
            tried = ", ".join(str(b) for b in sorted(peaks))
            lines.append(f"| {METHODS[name]} | {result['feasible']} | {shown} | {tried} |")
        lines += [
            "",
            (
                "Gradients and activations both grow with the number of loop steps, so without checkpointing the "
                "ratio of the two batches is set by width and tokens, not by the steps. With checkpointing the "
                "activations of one step are alive at a time, and the sketches themselves are what is left."
            ),
            "",
        ]
    else:
        lines += ["This system does not tell a process's peak memory, so feasible batches were not measured.", ""]
    gradients, features = library["gradient_bytes"], library["feature_bytes"]
    weights = 4 * library["parameters"]
    lines += [
        (
            f"By arithmetic, for the model whose scores were compared ({config.model.steps} loop steps, "
            f"{config.model.sequence_len} tokens, float32), bytes of one example:"
        ),
        "",
        "| | MB per example |",
        "|---|---|",
        f"| gradients of every step | {gradients / 1e6:.1f} |",
        f"| sketches, m = {config.reference_size} | {features / 1e6:.1f} |",
        f"| activations that autograd keeps (counted, CPU) | {saved / 1e6:.1f} |",
        "",
        (
            f"The features of an example take {gradients / features:.0f} times less than its step gradients "
            f"({library['body_tensors']} weights of {library['body_parameters'] / 1e6:.1f}M parameters together)."
        ),
    ]
    if config.model == LoopedGPTConfig.paper():
        batches = [_arithmetic(GPU_BYTES - 2 * weights, saved + kept) for kept in (gradients, features)]
        doubled = _arithmetic(GPU_BYTES - 2 * weights, saved + 2 * gradients)
        lines += [
            "",
            (
                f"In 48 GB, with weights and one gradient of them, that leaves room for batches of {batches[0]} "
                f"with full gradients ({doubled} if they are copied once, as joining per-layer gradients into rows "
                f"does) and of {batches[1]} with sketches, in multiples of 4; the paper measured 4 and 40. A bound "
                "from counting, not a measurement: it leaves out workspace and fragmentation, and a GPU's "
                "attention keeps less than the CPU's. The paper's own estimate (48 tensors, a body of the order of "
                "100M parameters, 1,000 times less memory) counts other than we do: 48 are the matrices of all "
                "eight blocks, while the loop body that D.1 names, four blocks and the adapter, has 25."
            ),
        ]
    return Section("Memory", "\n".join(lines))


def timing_section(config: Config, timings: Result, ratio: Mapping[str, float], *, cpu: bool) -> Section:
    """Seconds of each contestant and ratios to a training step."""
    t = config.timing
    lines = [
        (
            f"Looped GPT of width {t.model.d_model}, {t.model.steps} loop steps, {t.model.sequence_len} tokens, "
            f"batch {t.batch}; medians of {t.rounds} rounds in which the contestants alternate. Ratios are to the "
            f"training step's {'processor' if cpu else 'clock'} seconds of the same round."
        ),
        "",
        "| | clock, s | processor, s | over a training step |",
        "|---|---|---|---|",
    ]
    for k, name in enumerate(timings["names"]):
        wall, used = np.median(timings["wall"][k]), np.median(timings["cpu"][k])
        lines.append(f"| {name} | {wall:.2f} | {used:.2f} | {ratio[name]:.2f} |")
    slowed = float(np.median(timings["wall"] / np.maximum(timings["cpu"], 1e-9)))
    if cpu and slowed > 1.2:
        lines += ["", f"Other programs had the machine, too: the clock ran {slowed:.1f} times the processor seconds."]
    lines += [
        "",
        (
            f"*{STEP}*: forward and backward pass for all parameters. *{SDI}*: sketches of every step and the "
            f"scores of all pairs. *{TRACIN}*: the gradient of the loop body per example, kept, and their dot "
            f"products; no steps. *{EXACT}*: gradients of every step of a single example (`ExactCapture`); for the "
            f"batch it would be {t.batch} times that."
        ),
        "",
        (
            "The summary's 1.3 and 1.9 do not say how often attribution is run. If every batch that is trained on "
            f"is attributed once, training and attribution take {1 + ratio[SDI]:.2f} times as long as training; a "
            f"total of 1.3 is met when at most {100 * 0.3 / ratio[SDI]:.0f} % of the training batches are "
            "attributed. The paper attributes a few checkpoints, which costs far less."
        ),
    ]
    return Section("Time", "\n".join(lines))


def _arithmetic(budget: float, per_example: float) -> int:
    """Largest multiple of 4 examples within a budget of bytes."""
    return max(0, int(budget // per_example) // 4 * 4)
