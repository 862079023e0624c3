"""What the cost model predicts for the shapes that ``bench.gpu.run`` times, on an H100-class device.

    python -m bench.gpu.predict --keep    # bench/results/predicted-sm90.json; docs/kernels.md states its figures

Needs no GPU. Cycles are counted in machine code (counted.py and :data:`DIRECT_CYCLES`), rates of the device are data
sheets' with a margin (:data:`ASSUMED`). A launch takes as long as the busiest of what it needs: to issue instructions,
shared memory, tensor cores, bytes of its inputs. What is known to come on top is added: ``direct``'s epilogue and
atomics, launches. gpu-check prints measured over predicted for each row, so that the first run says which of these is
wrong: a ratio that stays the same over shapes is a rate, one that changes with them is a part that binds and is not in
the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.counted import COUNTED
from bench.gpu.layers import DTYPES, Case, cases
from sdi_kernels import TensorSketch
from sdi_kernels.triton import common, configs, cost, slots, transforms

RESULT = Path(__file__).resolve().parents[1] / "results" / "predicted-sm90.json"

ASSUMED = {
    "multiprocessors x clock, cycles a second": cost.CYCLES_PER_SECOND,
    "memory, bytes a second": 2.8e12,
    "atomic adds a second": 1e12,
    "launch, seconds": 5e-6,
    "weight-gradient product of bfloat16, FLOP a second": 650e12,
    "weight-gradient product of float32, FLOP a second": 50e12,
}

CONFLICTS = 2.5 / 32
"""Cycles of shared memory for each feature that is gathered there, beyond those counted without conflicts: 32 addresses
at random in as many banks take 3.5 turns."""


DIRECT_CYCLES: dict[str, tuple[tuple[int, int, int], cost.Cycles, cost.Cycles]] = {
    "direct large half": ((128, 128, 64), cost.Cycles(280, 440, 512), cost.Cycles(3128, 0, 0)),
    "direct large tf32x3": ((128, 64, 32), cost.Cycles(980, 768, 768), cost.Cycles(2380, 0, 0)),
    "direct small half": ((64, 64, 64), cost.Cycles(127, 156, 128), cost.Cycles(969, 0, 0)),
    "direct small tf32x3": ((64, 64, 32), cost.Cycles(570, 480, 384), cost.Cycles(1254, 0, 0)),
}
"""A shipped tile of ``direct`` (outputs, inputs, tokens a pass): one pass of its loop, and what comes before and after
the loop, its atomics counted as they are issued."""


def _times(cycles: cost.Cycles, factor: float) -> cost.Cycles:
    return cost.Cycles(*(factor * x for x in cycles))


def _launch(parts: dict[str, float], *after: float) -> dict[str, Any]:
    """A launch whose parts overlap, in ms; ``after``: seconds of what does not."""
    bound = max(parts, key=lambda name: parts[name])
    ms = {name: 1e3 * seconds for name, seconds in parts.items()}
    return {"ms": ms[bound] + 1e3 * sum(after), "bound": bound, "parts_ms": ms}


def _busy(cycles: cost.Cycles) -> dict[str, float]:
    return {name: count / cost.CYCLES_PER_SECOND for name, count in cycles._asdict().items()}


def fft(case: Case) -> dict[str, Any]:
    """Both launches. On top of the shared memory counted come conflicts of banks in gathers, and lines that pass
    through the cache, which shares its pipe: features, and slots and registers that are loaded for every token."""
    single = case.dtype == torch.float32
    found = COUNTED[case.m, case.d_out, case.d_in][single]
    config = transforms.config_of(case.m, single, common.FALLBACK_SHARED)
    chunk = config.rows * config.n2
    layouts = layouts_of(case)
    constants = slots.constants_of(layouts, case.dtype.itemsize, config)
    shared = found.shared + found.local * config.num_warps
    for layout, d, name in zip(layouts, (case.d_in, case.d_out), ("IN", "OUT"), strict=True):
        lines = d * case.dtype.itemsize / 128
        if not constants[f"IS_KEPT_{name}"]:
            lines += layout.passes * layout.lines * chunk * 4 / 128
        shared += lines + (d * CONFLICTS if layout.slots else 0)
    programs = 1 if constants["IS_WHOLE"] else config.residues
    busy = _times(cost.Cycles(found.issue, shared, found.tensor), programs * case.rows * case.tokens)
    read = input_bytes(case) / ASSUMED["memory, bytes a second"]
    return _launch({**_busy(busy), "bytes": read}, 2 * ASSUMED["launch, seconds"])


def layouts_of(case: Case) -> tuple[slots.Layout, slots.Layout]:
    """How the kernel gathers both sides, "in" and "out", of a sketch of the default family."""
    config = transforms.config_of(case.m, case.dtype == torch.float32, common.FALLBACK_SHARED)
    sketch, size = TensorSketch(case.d_out, case.d_in, case.m), case.dtype.itemsize
    layout_in, layout_out = (
        slots.layout_of(side.bucket.astype(np.int64), side.d, size, config) for side in (sketch.inp, sketch.out)
    )
    return layout_in, layout_out


def direct(case: Case) -> dict[str, Any]:
    kind = "tf32x3" if case.dtype == torch.float32 else "half"
    (block_o, block_i, block_t), loop, rest = DIRECT_CYCLES[configs.direct_key(case.d_out, case.d_in, kind)]
    tiles = case.rows * -(-case.d_out // block_o) * -(-case.d_in // block_i)
    read = input_bytes(case) / ASSUMED["memory, bytes a second"]
    adds = case.rows * case.d_out * case.d_in / ASSUMED["atomic adds a second"]
    epilogue = max(tiles * rest.issue / cost.CYCLES_PER_SECOND, adds)
    passes = _times(loop, tiles * -(-case.tokens // block_t))
    return _launch({**_busy(passes), "bytes": read}, epilogue, ASSUMED["launch, seconds"])


def input_bytes(case: Case) -> float:
    return float(case.rows * case.tokens * (case.d_out + case.d_in) * case.dtype.itemsize)


def baselines(case: Case) -> dict[str, float]:
    """ms of what the kernels replace. The published formula is bound by what it streams through memory: for every token
    40 bytes a bucket (zeros, both transforms, their product, its sum) and 20 a feature (signs, scatter)."""
    tokens, name = case.rows * case.tokens, str(case.dtype)[6:]
    flops = 2.0 * tokens * case.d_out * case.d_in
    rate = ASSUMED[f"weight-gradient product of {name}, FLOP a second"]
    read = input_bytes(case) / ASSUMED["memory, bytes a second"]
    streamed = tokens * (40.0 * case.m + 20.0 * (case.d_out + case.d_in)) / ASSUMED["memory, bytes a second"]
    return {"weight_gradient_gemm": 1e3 * max(flops / rate, read), "published_formula": 1e3 * streamed}


def predicted(case: Case) -> dict[str, Any]:
    routes = {"fft": fft(case), "direct": direct(case)}
    best = min(found["ms"] for found in routes.values())
    ms = baselines(case)
    return {
        "d_out": case.d_out, "d_in": case.d_in, "tokens": case.tokens, "m": case.m, "dtype": str(case.dtype)[6:],
        "rows": case.rows, "routes": routes, "baselines_ms": ms,
        "best_over": {name: best / value for name, value in ms.items()},
    }  # fmt: skip


def looped_gpt(dtype: torch.dtype) -> dict[str, Any]:
    """Featurizing the paper's looped GPT (135.1M parameters, 32 steps, 128 tokens, m = 2048) over a training step.

    By the products of the linear layers of its body alone: plain training has three of each, featurizing two and a
    sketch. What both do beside (attention, norms, layers outside of the loop) brings the ratio nearer to 1.
    """
    from stepinfluence.models.gpt import LoopedGPT, LoopedGPTConfig

    config = LoopedGPTConfig.paper()
    with torch.device("meta"):
        body = LoopedGPT(config).core
    product = sketch = 0.0
    for layer in body.modules():
        if isinstance(layer, torch.nn.Linear):
            row = predicted(Case(*layer.weight.shape, config.sequence_len, 2048, dtype))
            tokens = row["rows"] * row["tokens"]
            product += row["baselines_ms"]["weight_gradient_gemm"] / tokens
            sketch += min(found["ms"] for found in row["routes"].values()) / tokens
    name = str(dtype)[6:]
    return {"goal": f"{name}: featurizing the 135.1M looped GPT (32 steps) at most 1.0 training step",
            "predicted": (2 * product + sketch) / (3 * product), "met": sketch <= product}  # fmt: skip


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals set for an H100: what is predicted, and whether it is met."""
    faster = [1 / row["best_over"]["published_formula"] for row in rows]

    def share(dtype: str, side: int) -> float:
        over = [
            row["best_over"]["weight_gradient_gemm"] for row in rows
            if row["dtype"] == dtype and min(row["d_out"], row["d_in"]) >= side
        ]  # fmt: skip
        return max(over)

    single, half = share("float32", 768), share("bfloat16", 2048)
    return [
        {"goal": "published formula: at least 5 times faster at every shape", "predicted": min(faster),
         "met": min(faster) >= 5},
        {"goal": "published formula: at least 10 times faster in the median", "predicted": statistics.median(faster),
         "met": statistics.median(faster) >= 10},
        {"goal": "float32: at most 0.5 of the weight-gradient product from 768 x 768 up", "predicted": single,
         "met": single <= 0.5},
        {"goal": "bfloat16: at most 1.0 of the weight-gradient product from 2048 x 2048 up", "predicted": half,
         "met": half <= 1.0},
        *(looped_gpt(dtype) for dtype in DTYPES),
    ]  # fmt: skip


def table() -> dict[str, Any]:
    rows = [predicted(case) for case in cases()]
    return {"target": "sm_90", "assumed": ASSUMED, "goals": goals(rows), "rows": rows}


def kept() -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows of the kept table by what :func:`key` makes of them; none where it is missing."""
    if not RESULT.is_file():
        return {}
    return {key(row): row for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row of this table and of a measured one have in common."""
    return tuple(row[name] for name in ("d_out", "d_in", "tokens", "m", "dtype", "rows"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    from bench.provenance import Provenance  # what gpu-check reads of this module does without the library

    provenance = Provenance()
    found = table()
    for goal in found["goals"]:
        print(f"{goal['goal']}: {goal['predicted']:.2f}, {'met' if goal['met'] else 'not met'}")
    if options.keep:
        content = {"provenance": provenance.finish(), **found}
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(RESULT)


if __name__ == "__main__":
    main()
