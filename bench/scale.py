"""What a corpus costs: bytes, operations and hours of featurizing and searching, from rates measured here.

    python -m bench.scale [--model paper|gpt512] [--examples 2] [--keep]        # measure, then docs/scale.md's tables
    python -m bench.scale --rates FILE                                          # the tables again, from kept rates

Rates are taken in CPU seconds of one thread, so that a busy machine does not change them. What is said of GPUs is an
estimate: a share of the data sheet's peak (:data:`GPU_TFLOPS`), not a measurement.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import stepinfluence
import torch
from stepinfluence.models import LoopedGPT, LoopedGPTConfig
from stepinfluence.models.gpt import gpt_loss
from stepinfluence.store import Manifest, RowInfo, Store, StoreWriter, bytes_per_row

from bench.provenance import Provenance, add_output, machine_line, machine_slug, write

MODELS = {
    "paper": LoopedGPTConfig.paper(),
    "large": replace(LoopedGPTConfig.large(), sequence_len=64),  # as bench.large runs it
    "gpt512": LoopedGPTConfig(vocab_size=1024, d_model=512, n_heads=8, n_prelude=0, n_core=2, n_coda=0, steps=8),
}
SKETCH_SIZE = 2048
SIZES = (10**6, 10**8, 10**10)
"""Tokens of the corpora."""

GPU_TFLOPS = 0.35 * 989
"""Estimate: 35 % of an H200's dense bf16 peak (data sheet: 989 TFLOP/s), as a training step of this size would get."""

GPU_SCAN = 0.7 * 4.8e12
"""Estimate: bytes a second that a scan reads, 70 % of an H200's memory bandwidth (data sheet: 4.8 TB/s)."""

GPU_BYTES = 141e9
"""An H200's memory (data sheet)."""

DISK = 5e9
"""Estimate: bytes a second from one NVMe disk."""

PCIE = 50e9
"""Estimate: bytes a second from host memory to a GPU over PCIe 5.0 x16 (63 GB/s in theory)."""


@dataclass(frozen=True)
class Rates:
    """CPU seconds of one thread.

    Attributes:
        featurize: per token, model and sketches.
        write: per byte of a store written (encoding, checksum, file system calls).
        scan: per byte of an int8 store scanned for 8 queries.
    """

    model: str
    tokens: int
    featurize: float
    write: float
    scan: float


def cpu_seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(name: str, examples: int) -> Rates:
    config = MODELS[name]
    torch.manual_seed(0)
    model = LoopedGPT(config)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE)
    tokens = torch.randint(config.vocab_size, (examples, config.sequence_len + 1))[:, : config.sequence_len]
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    # Of a corpus, verification is one batch: it is left out.
    took = cpu_seconds(lambda: capture.featurize([batch], gpt_loss, per_step=False, progress=False, verify=False))
    write, scan = _store_rates(capture)
    return Rates(name, tokens.numel(), took / tokens.numel(), write, scan)


def _store_rates(capture: stepinfluence.Capture, rows: int = 2048) -> tuple[float, float]:
    space = capture.space()
    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest.of(capture, rows, shard_rows=512, dtype="int8")
        writer = StoreWriter.create(Path(folder) / "s", manifest)
        torch.manual_seed(0)
        values = torch.randn(512, capture.width)
        features = stepinfluence.Features(
            values, torch.ones(512), torch.ones(512).long(), None, tuple(range(512)), space
        )

        def write() -> None:
            for shard in range(manifest.n_shards):
                writer.write_shard(0, shard, features, [RowInfo(r) for r in manifest.rows_of(shard)])

        wrote = cpu_seconds(write)
        from stepinfluence.search import top_k

        store = Store.open(Path(folder) / "s")
        query = stepinfluence.Features(values[:8], torch.ones(8), torch.ones(8).long(), None, tuple(range(8)), space)
        top_k(store, query, 10, progress=False)
        scanned = cpu_seconds(lambda: top_k(store, query, 10, progress=False))
        size = rows * bytes_per_row(capture.width, "int8")
    return wrote / size, scanned / size


# ----------------------------------------------------------------------------------------------------------------
# Arithmetic


def operations(config: LoopedGPTConfig) -> dict[str, float]:
    """Floating-point operations per token: matrix products only, an add and a multiply each counted."""
    with torch.device("meta"):
        model = LoopedGPT(LoopedGPTConfig(**{**asdict(config), "vocab_size": 2}))
    of = {
        name: float(sum(p.numel() for p in part.parameters() if p.dim() > 1)) for name, part in model.named_children()
    }
    core, outer = of["core"], of["prelude"] + of["coda"]
    head = config.vocab_size * config.d_model
    # Scores and mixing of causal attention: on average half the context, two products of width d.
    attention = 2.0 * config.d_model * config.sequence_len / 2
    blocks = config.n_core * config.steps
    forward = 2 * (core * config.steps + outer + head) + 2 * attention * (blocks + config.n_prelude + config.n_coda)
    behind = 2 * (core * config.steps + of["coda"] + head) + 4 * attention * (blocks + config.n_coda)
    return {"forward": forward, "backward to the inputs": behind, "sketches, at most": 2 * core * config.steps}


def width_of(config: LoopedGPTConfig) -> int:
    """Columns of a feature row (no long vectors in these models: every parameter has m of its own)."""
    with torch.device("meta"):
        model = LoopedGPT(LoopedGPTConfig(**{**asdict(config), "vocab_size": 2}))
    return SKETCH_SIZE * sum(1 for _ in model.core.parameters())


def human(value: float, units: tuple[tuple[float, str], ...]) -> str:
    for size, unit in units:
        if value >= size:
            return f"{value / size:.3g} {unit}"
    size, unit = units[-1]
    return f"{value / size:.2g} {unit}"


def data(value: float) -> str:
    return human(value, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def duration(seconds: float) -> str:
    return human(
        seconds, ((365.25 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))
    )


def tables(rates: Rates) -> str:
    config = MODELS[rates.model]
    parts, width = operations(config), width_of(config)
    total = sum(parts.values())
    head = "| | " + " | ".join(f"10^{len(str(n)) - 1} tokens" for n in SIZES) + " |\n|---|" + "---|" * len(SIZES)
    lines = [head]

    def line(name: str, show: Callable[[float], str], value: Callable[[int], float]) -> None:
        lines.append(f"| {name} | " + " | ".join(show(value(n)) for n in SIZES) + " |")

    def rows(n: int) -> float:
        return n / config.sequence_len

    line(f"examples of {config.sequence_len} tokens", lambda v: f"{v:,.0f}", rows)
    line("operations", lambda v: f"{v:.2g} FLOP", lambda n: n * total)
    for dtype in ("fp32", "int8"):
        line(f"store, concat, {dtype}", data, lambda n, d=dtype: rows(n) * bytes_per_row(width, d))
    line(f"store, sum into {SKETCH_SIZE}, int8", data, lambda n: rows(n) * bytes_per_row(SKETCH_SIZE, "int8"))
    each = bytes_per_row(width, "int8")
    line("**one CPU core, measured rate**: featurize", duration, lambda n: n * rates.featurize)
    line("write, int8", duration, lambda n: rows(n) * each * rates.write)
    line("scan for 8 queries, int8", duration, lambda n: rows(n) * each * rates.scan)
    line("scan, store on one NVMe disk, estimate", duration, lambda n: rows(n) * each / DISK)
    for name, count in (("1 GPU", 1), ("64 GPUs", 64)):
        line(
            f"**{name}, estimate**: featurize",
            duration,
            lambda n, c=count: n * total / (GPU_TFLOPS * 1e12) / c,
        )
    line(
        "1 GPU, estimate: scan, store in GPU memory",
        lambda v: duration(v / GPU_SCAN) if v < GPU_BYTES else "does not fit",
        lambda n: rows(n) * each,
    )
    line("1 GPU, estimate: scan, store in host memory", duration, lambda n: rows(n) * each / PCIE)
    per = ", ".join(f"{name} {value / 1e9:.2f} GFLOP" for name, value in parts.items())
    speed = total / rates.featurize / 1e9
    return (
        f"model {rates.model}: {width:,} columns a row; per token: {per}\n"
        f"measured: {1 / rates.featurize:,.1f} tokens a core-second ({speed:.1f} GFLOP/s), store written at "
        f"{1e-6 / rates.write:,.0f} MB and scanned at {1e-9 / rates.scan:.2f} GB a core-second\n\n" + "\n".join(lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="paper")
    parser.add_argument("--examples", type=int, default=2)
    parser.add_argument("--rates", type=Path)
    add_output(parser, f"scale-{machine_slug()}")
    given = parser.parse_args()
    if given.rates is not None:
        print(tables(Rates(**json.loads(given.rates.read_text())["rates"])))
        return
    torch.set_num_threads(1)
    provenance = Provenance()
    rates = measure(given.model, given.examples)
    write(given.json, provenance, {"rates": asdict(rates)})
    print(machine_line(provenance.finish()))
    print(tables(rates))


if __name__ == "__main__":
    main()
