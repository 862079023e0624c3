"""What this machine has, and what will therefore be used. Nothing here needs a GPU, Triton or any extra."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

import torch

from sdi_kernels import TensorSketch, plan_linear
from sdi_kernels.triton import tuning
from stepinfluence.extras import install_command
from stepinfluence.machine import machine_facts, versions

EXTRAS = {
    "report": ("plotly", "jinja2", "matplotlib"),
    "explore": ("starlette", "uvicorn"),
    "hf": ("transformers",),
}

TYPICAL_LAYERS = (
    ("this demo's MLP", 64, 256, 32, 22),
    ("parity model of the paper", 256, 256, 32, 42),
    ("small looped GPT", 768, 768, 8, 128),
    ("small looped GPT, MLP", 768, 3072, 8, 128),
    ("1B-parameter GPT", 2048, 2048, 8, 1024),
)
"""Name, d_in, d_out, examples and tokens of the layers that a plan is shown for (sketch size 2048)."""


@dataclass(frozen=True)
class LayerPlan:
    """The route chosen for one layer on one device: estimated seconds of each route, and the reason in one line."""

    layer: str
    shape: str
    device: str
    route: str
    seconds: dict[str, float]
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """Findings of :func:`diagnose`.

    Attributes:
        versions: of Python and the packages; "not installed" where missing.
        machine: operating system, CPU, threads, memory, GPUs.
        kernels: what sketches run on, per device type.
        plans: routes for typical layers.
        advice: one line for each thing that could be better, with the command that mends it.
    """

    versions: dict[str, str]
    machine: dict[str, str]
    kernels: dict[str, str]
    plans: tuple[LayerPlan, ...]
    advice: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this machine; takes well under a second beyond importing torch."""
    plans = [_plan(layer, torch.device("cpu")) for layer in TYPICAL_LAYERS]
    if torch.cuda.is_available():
        plans += [_plan(layer, torch.device("cuda", 0)) for layer in TYPICAL_LAYERS]
    return Diagnosis(versions(), machine_facts(), _kernels(), tuple(plans), tuple(_advice()))


def _kernels() -> dict[str, str]:
    variant = _cpu_variant()
    found = {"CPU": f"compiled kernels ({variant})" if variant else "plain torch (compiled kernels not available)"}
    if not torch.cuda.is_available():
        found["GPU"] = "none here"
    elif importlib.util.find_spec("triton") is None:
        found["GPU"] = "plain torch (Triton is not installed)"
    else:
        found["GPU"] = "Triton kernels"
        found["GPU tiles and rates"] = tuning.tuned(torch.device("cuda", torch.cuda.current_device())).source
    return found


def _cpu_variant() -> str | None:
    """Instruction set of the compiled CPU kernels; None if there are none here, or they do not say."""
    try:
        from sdi_kernels.cpu import native

        return native.instruction_set()
    except (ImportError, AttributeError, OSError):
        return None


def _plan(layer: tuple[str, int, int, int, int], device: torch.device) -> LayerPlan:
    name, d_in, d_out, rows, tokens = layer
    plan = plan_linear(rows, tokens, TensorSketch(d_out, d_in, 2048), device)
    shape = f"{d_in} → {d_out}, {rows} × {tokens} tokens"
    return LayerPlan(name, shape, device.type, plan.route, dict(plan.seconds), plan.explain())


def _advice() -> list[str]:
    lines = []
    if _cpu_variant() is None:
        lines.append(
            "no compiled CPU kernels, so plain torch is used: install a C compiler, then run "
            "pip install --no-deps --force-reinstall CHECKOUT (the folder with pyproject.toml)"
        )
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        lines.append("there is a GPU but no Triton: run pip install triton")
    for extra, modules in EXTRAS.items():
        missing = missing_modules(modules)
        if missing:
            lines.append(f"{', '.join(missing)} not installed: run {install_command(extra)}")
    return lines


def missing_modules(modules: tuple[str, ...]) -> list[str]:
    """Those of ``modules`` that cannot be imported here (looked up without importing them)."""
    # A module that was imported, or replaced by None to hide it, is looked up in sys.modules.
    return [m for m in modules if (sys.modules[m] is None if m in sys.modules else not importlib.util.find_spec(m))]
