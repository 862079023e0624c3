"""The looped GPT of the paper's D.1, end to end: cost of a checkpoint, feasible batches, errors over the sketch size.

Each part is a function that returns numbers and runs on a CPU as well, with a small set-up: that is how it is
tested. Memory is read from CUDA's allocator, so it is None elsewhere. :func:`parts` gives them in order, cheap ones
first, for a runner that stops when its time is up.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from stepinfluence.attribution.features import Features
from stepinfluence.capture import ExactCapture, attach
from stepinfluence.models.gpt import LoopedGPT, LoopedGPTConfig, gpt_loss
from torch import Tensor

from sdi_kernels import HashFamily

Batch: TypeAlias = dict[str, Tensor]

PAPER = {
    "gpu": "RTX A6000, 48 GB", "sdi_error": 0.0388, "sdi_error_std": 0.0030, "tracin_error": 0.0220,
    "tracin_error_std": 0.0052, "slope": -0.489, "sketch_size": 2048, "batch_sketched": 40, "batch_exact": 4,
    "added_seconds_per_checkpoint": 2.55, "added_at_batch": 40,
}  # fmt: skip
"""What the paper reports (arXiv 2602.10097, section 4 and D.1), hashing iid."""


@dataclass(frozen=True)
class Setup:
    """Sizes of a run; the defaults are the paper's, with fewer sketch seeds."""

    model: LoopedGPTConfig = field(default_factory=LoopedGPTConfig.paper)
    sketch_size: int = 2048
    batch: int = 40
    repeats: int = 3
    error_batch: int = 4
    error_sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    error_seeds: int = 3
    memory_batches: tuple[int, int] = (4, 8)
    exact_batches: tuple[int, int] = (1, 2)

    @classmethod
    def tiny(cls) -> Setup:
        """Seconds on a CPU, for tests."""
        model = LoopedGPTConfig(
            vocab_size=31, d_model=16, n_heads=2, sequence_len=8, n_prelude=1, n_core=1, n_coda=0, steps=2
        )
        return cls(model, 64, 3, 1, 2, (32, 64), 2, (1, 2), (1, 2))


class Bench:
    """The model on a device and random batches for it; the same ones in every run."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = setup, device
        torch.manual_seed(0)
        self.model = LoopedGPT(setup.model).to(device)
        self.capture = attach(self.model, body=self.model.core, sketch_size=setup.sketch_size, verify=False)

    def batch(self, size: int) -> Batch:
        config, generator = self.setup.model, torch.Generator().manual_seed(1)
        shape = (2, size, config.sequence_len)
        tokens, targets = torch.randint(config.vocab_size, shape, generator=generator).to(self.device)
        return {"tokens": tokens, "targets": targets}

    def inference(self, batch: Batch) -> None:
        with torch.no_grad():
            gpt_loss(self.model, batch)

    def training_step(self, batch: Batch) -> None:
        gpt_loss(self.model, batch).sum().backward()
        self.model.zero_grad(set_to_none=True)

    def featurize(self, batch: Batch) -> Features:
        return self.capture.featurize([batch], gpt_loss, progress=False)

    def checkpoint(self, batch: Batch) -> Tensor:
        """What a checkpoint costs: features of the batch, and the influence of each example on each, step by step."""
        return sdi(self.featurize(batch).values)

    def seconds(self, call: Callable[[], object]) -> float:
        """Median time of ``call`` after one run to warm up."""
        call()
        times = []
        for _ in range(self.setup.repeats):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Most memory allocated at once during ``call``, what was there before included; None without CUDA."""
        if self.device.type != "cuda":
            call()
            return None
        self.release()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self._wait()
        return torch.cuda.max_memory_allocated(self.device)

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def sdi(per_step: Tensor) -> Tensor:
    """Step-decomposed influence of a batch on itself: ``(B, steps, D) -> (B, B, steps)``."""
    return torch.einsum("id,jtd->ijt", per_step.sum(1), per_step)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# ---------------------------------------------------------------------------------------------------------------
# The parts


def costs(bench: Bench) -> dict[str, Any]:
    """Seconds and peak memory of an inference pass, a training step and a checkpoint's attribution, at one batch."""
    batch = bench.batch(bench.setup.batch)
    calls: dict[str, Callable[[], object]] = {
        "inference": lambda: bench.inference(batch),
        "training_step": lambda: bench.training_step(batch),
        "featurize": lambda: bench.featurize(batch),
        "checkpoint": lambda: bench.checkpoint(batch),
    }
    seconds = {name: bench.seconds(call) for name, call in calls.items()}
    peak = {name: bench.peak_bytes(call) for name, call in calls.items()}
    sketches = bench.featurize(batch).values
    found: dict[str, Any] = {
        "batch": bench.setup.batch, "parameters": sum(p.numel() for p in bench.model.parameters()),
        "sketch_bytes": sketches.numel() * sketches.element_size(), "seconds": seconds, "peak_bytes": peak,
        "featurize_over_training_step": seconds["featurize"] / seconds["training_step"],
        "added_seconds_per_checkpoint": seconds["checkpoint"] - seconds["inference"],
    }  # fmt: skip
    if peak["featurize"] is not None and peak["training_step"] is not None:
        allowed = peak["training_step"] + found["sketch_bytes"]
        found["featurize_memory_over_allowed"] = peak["featurize"] / allowed
    return found


def errors(bench: Bench, stop: Callable[[], bool] = lambda: False) -> Iterator[dict[str, Any]]:
    """Relative errors of SDI and TracIn over sketch sizes, for both of the paper's measures; grows as it goes."""
    setup = bench.setup
    batch = bench.batch(setup.error_batch)
    exact = ExactCapture(bench.model, body=bench.model.core)
    gradients = exact.featurize([batch], gpt_loss, progress=False).values
    want = sdi(gradients.double()) if gradients.device.type == "cpu" else sdi_in_parts(gradients)
    del gradients, exact
    bench.release()
    found: dict[str, Any] = {"batch": setup.error_batch, "seeds": setup.error_seeds, "sdi": {}, "tracin": {}}
    families: tuple[HashFamily, ...] = ("balanced", "iid", "block")
    for size in sorted(setup.error_sizes, key=lambda m: m != setup.sketch_size):  # the paper's first
        for family in families:
            if stop():
                found["stopped"] = "no time left"
                yield found
                return
            sketched = [_sketched(bench, batch, size, family, seed) for seed in range(setup.error_seeds)]
            for key, of in (("sdi", lambda s: s), ("tracin", lambda s: s.sum(-1))):
                values = [relative_error(of(s), of(want)) for s in sketched]
                found[key].setdefault(family, {})[str(size)] = values
        yield found
    for family in families:
        points = [(math.log(int(m)), math.log(statistics.mean(e))) for m, e in found["sdi"][family].items()]
        if len(points) > 1:
            found.setdefault("slope", {})[family] = statistics.linear_regression(*zip(*points, strict=True)).slope
    yield found


def sdi_in_parts(per_step: Tensor) -> Tensor:
    """:func:`sdi` in float64, a slice of the gradient at a time: the whole of it would not fit twice."""
    total = 0.0
    for part in per_step.split(1 << 20, dim=-1):
        total = total + sdi(part.double())
    assert isinstance(total, Tensor)
    return total


def _sketched(bench: Bench, batch: Batch, size: int, family: HashFamily, seed: int) -> Tensor:
    capture = attach(bench.model, body=bench.model.core, sketch_size=size, hashing=family, seed=seed, verify=False)
    return sdi(capture.featurize([batch], gpt_loss, progress=False).values.double())


def feasible(bench: Bench, total_bytes: int | None) -> dict[str, Any]:
    """The largest batch of each method, from the growth of its peak memory; then that batch of sketches, really run."""
    exact = ExactCapture(bench.model, body=bench.model.core)
    methods: dict[str, tuple[tuple[int, int], Callable[[Batch], object]]] = {
        "sketched": (bench.setup.memory_batches, bench.featurize),
        "exact": (bench.setup.exact_batches, lambda batch: exact.featurize([batch], gpt_loss, progress=False)),
    }
    found: dict[str, Any] = {"total_bytes": total_bytes}
    for name, (sizes, run) in methods.items():
        peaks = [bench.peak_bytes(lambda size=size, run=run: run(bench.batch(size))) for size in sizes]  # type: ignore[misc]
        found[name] = {"peak_bytes": dict(zip(map(str, sizes), peaks, strict=True))}
        if total_bytes is not None and None not in peaks:
            found[name]["largest_batch"] = largest_batch(sizes, (peaks[0] or 0, peaks[1] or 0), total_bytes)
    size = found["sketched"].get("largest_batch", 0)
    while size > bench.setup.memory_batches[1]:
        try:
            bench.peak_bytes(lambda size=size: bench.featurize(bench.batch(size)))  # type: ignore[misc]
            found["sketched"]["largest_batch_run"] = size
            break
        except torch.cuda.OutOfMemoryError:
            bench.release()
            size = int(0.9 * size)
    return found


def largest_batch(sizes: tuple[int, int], peaks: tuple[int, int], total: int) -> int:
    """Where the line through two measured peaks reaches ``total``; a twentieth is left to fragmentation."""
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    if slope <= 0:
        raise ValueError(f"peaks: got {peaks} at batches {sizes}; memory must grow with the batch")
    return max(0, math.floor((0.95 * total - peaks[0]) / slope + sizes[0]))


def parts(bench: Bench, total_bytes: int | None, stop: Callable[[], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) as they come; a part that comes again has grown."""
    yield "costs", costs(bench)
    if stop():
        return
    for found in errors(bench, stop):
        yield "errors", found
    if not stop():
        yield "feasible", feasible(bench, total_bytes)


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines of the report, beside the paper's figures."""
    lines = ["## The looped GPT of the paper's D.1, end to end (fp32)", ""]
    if (found := results.get("costs")) is not None:
        seconds, peak = found["seconds"], found["peak_bytes"]
        lines += [
            f"{found['parameters'] / 1e6:.1f}M parameters, batch {found['batch']}.", "",
            "| pass | seconds | peak memory, GB |", "|---|---|---|",
            *(f"| {name} | {s:.3f} | {'–' if peak[name] is None else f'{peak[name] / 1e9:.1f}'} |"
              for name, s in seconds.items()), "",
            (f"Featurizing over a training step: {found['featurize_over_training_step']:.2f} (aim: at most 1). "
            f"Added to an inference pass per checkpoint: {found['added_seconds_per_checkpoint']:.2f} s; the paper: "
            f"{PAPER['added_seconds_per_checkpoint']} s at batch {PAPER['added_at_batch']} on an {PAPER['gpu']}."),
        ]  # fmt: skip
        if "featurize_memory_over_allowed" in found:
            share = found["featurize_memory_over_allowed"]
            lines.append(f"Peak memory of featurizing over that of a training step and the sketches: {share:.2f}.")
        lines.append("")
    if (found := results.get("errors")) is not None:
        families = list(found["sdi"])
        lines += [
            (f"Relative errors, batch {found['batch']}, mean of {found['seeds']} seeds; the paper at m = "
            f"{PAPER['sketch_size']}, iid: {PAPER['sdi_error']} and {PAPER['tracin_error']}."), "",
            "| m | " + " | ".join(f"{key}, {f}" for key in ("SDI", "TracIn") for f in families) + " |",
            "|---|" + "---|" * (2 * len(families)),
        ]  # fmt: skip
        for m in sorted({int(m) for family in families for m in found["sdi"][family]}):
            cells = [found[key][f].get(str(m)) for key in ("sdi", "tracin") for f in families]
            lines.append(
                f"| {m} | " + " | ".join("–" if c is None else f"{statistics.mean(c):.4f}" for c in cells) + " |"
            )
        if "slope" in found:
            slopes = ", ".join(f"{family} {slope:.3f}" for family, slope in found["slope"].items())
            lines += ["", f"Log-log slope of the SDI error: {slopes}; the paper: {PAPER['slope']}."]
        lines.append("")
    if (found := results.get("feasible")) is not None and "largest_batch" in found["sketched"]:
        sketched, exact = found["sketched"], found["exact"]
        lines += [
            (f"Largest batch by peak memory: {sketched['largest_batch']} sketched (run: "
            f"{sketched.get('largest_batch_run', 'none')}), {exact['largest_batch']} with full gradients; the paper: "
            f"{PAPER['batch_sketched']} and {PAPER['batch_exact']} in 48 GB."), "",
        ]  # fmt: skip
    return lines
