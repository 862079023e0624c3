"""The results of a GPU run: one JSON file and one Markdown table, whole at every moment."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu import end_to_end, predict

COLUMNS = (
    "d_out × d_in", "tokens", "m", "dtype", "fft", "direct", "shear (block)", "planned", "/GEMM", "/published",
    "/einsum", "GB/s (share)", "fft, direct over predicted",
)  # fmt: skip
RESULTS = Path(__file__).resolve().parents[1] / "results"


def machine() -> dict[str, str]:
    import triton

    git = ["git", "-C", str(RESULTS.parents[1]), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": str(torch.version.cuda), "python": platform.python_version(), "commit": commit or "unknown",
        "fp32_precision": torch.get_float32_matmul_precision(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    lines = [
        " · ".join(f"{k} {v}" for k, v in report["machine"].items()),
        "",
        *([] if report["finished"] else ["**The run did not come to its end**; what it had is below.", ""]),
        "Measured ceilings: " + ", ".join(f"{k} {v:.4g}" for k, v in report["ceilings"].items()) + ".",
        f"Tiles and rates of the planner: {report['tuning']}.",
        *(f"compute-sanitizer {tool}: {outcome}." for tool, outcome in report["sanitizer"].items()),
        "",
        *end_to_end.markdown(report["end_to_end"]),
        "## Layers",
        "",
        "ns per token, median; ratios: time of the faster of fft and direct over the baseline's.",
        "GB/s: bytes of inputs, read once, over that time, and its share of the measured copy.",
        f"Over predicted: times of fft and direct over those of {predict.RESULT.name}, with what was to bind.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    expected = predict.kept()
    for r in report["cases"]:
        ms, tokens = r["ms"], r["rows"] * r["tokens"]
        per_token = {k: 1e6 * v / tokens for k, v in ms.items()}
        kernels = [ms[k] for k in ("fft", "direct") if k in ms]
        missing = {k: "refused" if k in r["refused"] else "–" for k in ("fft", "direct", "shear")}
        cells = [f"{per_token[k]:.2f}" if k in per_token else missing[k] for k in missing]
        if kernels:
            best = min(kernels)
            baselines = ("weight_gradient_gemm", "published_formula", "per_example_gradients")
            ratios = [f"{best / ms[k]:.2f}" if k in ms else "refused" for k in baselines]
            rate = r["input_bytes"] / (1e6 * best)
            ratios.append(f"{rate:.0f} ({rate / report['ceilings']['copy_gb_s']:.0%})")
        else:
            ratios = ["–"] * 4
        ratios.append(", ".join(over_predicted(r, expected).values()) or "–")
        head = [f"{r['d_out']} × {r['d_in']}", r["tokens"], r["m"], r["dtype"], *cells, r["planned"]]
        lines.append("| " + " | ".join(map(str, [*head, *ratios])) + " |")
    lines += ["", *(f"Refused: {c}" for c in report["refused"]), *(f"Not reached: {c}" for c in report["not_reached"])]
    return "\n".join(lines) + "\n"


def over_predicted(record: dict[str, Any], expected: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, str]:
    """Measured over predicted time of the routes that both have, with what was to bind: "1.40 (shared)"."""
    routes = expected.get(predict.key(record), {"routes": {}})["routes"]
    return {
        name: f"{record['ms'][name] / route['ms']:.2f} ({route['bound']})"
        for name, route in routes.items() if name in record["ms"]
    }  # fmt: skip


def new(about: dict[str, str]) -> dict[str, Any]:
    """An empty report."""
    return {
        "machine": about, "ceilings": {}, "tuning": "", "end_to_end": {}, "cases": [], "sanitizer": {}, "refused": [],
        "not_reached": [], "finished": False,
    }  # fmt: skip


def write(report: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Both files, each replaced in one go, so that a run that is killed leaves what it had. Returns the JSON's path."""
    about = report["machine"]
    name = "-".join(re.sub(r"[^A-Za-z0-9.+]+", "_", about[part]) for part in ("gpu", "torch", "triton"))
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".md", markdown(report)), (".json", json.dumps(report, indent=1) + "\n")):
        handle, temporary = tempfile.mkstemp(prefix=name, suffix=".tmp", dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(folder / f"{name}{suffix}")
    return folder / f"{name}.json"
