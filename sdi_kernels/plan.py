"""Which route sketches a linear layer.

Three routes give the same numbers up to rounding (docs/kernels.md):

``direct``  forms the outer-product sum ``G = sum_l delta_l (x) a_l`` of one example and folds it into ``m`` buckets.
            Cost per example: the weight-gradient GEMM plus one pass over ``G``. Wins for small layers and long runs of
            tokens.
``fft``     transforms the CountSketches of each token and multiply-accumulates over tokens in the frequency domain.
            Cost per token is independent of the layer's size. Wins for large layers.
``shear``   is ``direct`` on a GPU with the buckets of a block summed inside the product, for 16 times fewer atomics.
            Not timed yet, so only sketches with ``hashing="block"`` are given to it; elsewhere it is ``direct``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from sdi_kernels.cpu import cost, native
from sdi_kernels.sketches import TensorSketch
from sdi_kernels.triton import common, configs, tuning
from sdi_kernels.triton import cost as cuda_cost

Route: TypeAlias = Literal["auto", "direct", "fft", "shear"]
ROUTES: tuple[str, ...] = get_args(Route)


@dataclass(frozen=True)
class TorchRates:
    """Measured speeds of the plain-torch routes, in operations per second (``python -m bench.calibrate_plan``)."""

    gemm: float
    fold: float
    transform: float
    scatter: float = math.inf


RATES = {
    # The plain-torch routes; the compiled kernels have their own model (sdi_kernels/cpu/cost.py).
    "cpu": TorchRates(gemm=80e9, fold=0.9e9, transform=12e9, scatter=0.4e9),
    "cuda": TorchRates(gemm=30e12, fold=50e9, transform=2e12),
}


PLAIN_CALL = 1e-4
"""Seconds of a plain route's torch operations on next to no data; a compiled kernel takes less."""

SHIPPED_SOURCE = "shipped with the package (python -m bench.calibrate_plan)"


@dataclass(frozen=True)
class LinearPlan:
    """The chosen route for one call, with the estimates (seconds) it was chosen by.

    ``source`` says where the speeds behind them come from, ``tile`` which tile a GPU kernel will use, and whose choice
    that was.
    """

    route: Literal["direct", "fft", "shear"]
    seconds: dict[str, float]
    forced: bool
    source: str = ""
    tile: str = ""

    def explain(self) -> str:
        """One line for people: what was chosen and why."""
        costs = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in self.seconds.items())
        why = "asked for by route=" if self.forced else "estimated cheapest"
        more = "".join(f"; {name}: {text}" for name, text in (("speeds", self.source), ("tile", self.tile)) if text)
        return f"{self.route} ({why}; estimates: {costs}{more})"


def _plain_seconds(rows: int, tokens: int, sketch: TensorSketch, rates: TorchRates) -> dict[str, float]:
    m = sketch.m
    # Where the input side is not contiguous it is sketched to m columns before the GEMM.
    width = sketch.d_in if sketch.inp.contiguous else m
    fold = rows * sketch.d_out * width / rates.fold
    gemm = 2.0 * rows * tokens * sketch.d_out * width / rates.gemm
    transform = rows * tokens * 2.5 * m * math.log2(max(2, m)) * 2 / rates.transform
    scatter = rows * tokens * (sketch.d_out + sketch.d_in) / rates.scatter
    return {"direct": gemm + fold + (0.0 if sketch.inp.contiguous else scatter), "fft": transform + scatter}


def plan_linear(
    rows: int,
    tokens: int,
    sketch: TensorSketch,
    device: torch.device,
    route: Route = "auto",
    *,
    dtype: torch.dtype = torch.float32,
) -> LinearPlan:
    """Choose the route for sketching ``rows`` examples of ``tokens`` tokens each, given in ``dtype``.

    Raises:
        ValueError: ``route`` is not one of :data:`ROUTES`, or ``"shear"`` with a sketch that it cannot take.
    """
    if route not in ROUTES:
        raise ValueError(f"route: got {route!r}; use one of {', '.join(map(repr, ROUTES))}")
    if route == "shear" and not sketch.shearable:
        raise ValueError(
            f"route: got 'shear' for {sketch}; it needs d_in <= m with inputs hashed in order (hashing='block' or "
            "'balanced'), and m a multiple of 16 up to 16384; use 'auto', 'direct' or 'fft'"
        )
    seconds, source = _estimates(rows, tokens, sketch, device, dtype)
    if route != "auto":
        choice: Literal["direct", "fft", "shear"] = route
        if route == "shear" and device.type != "cuda":
            choice = "direct"
    else:
        choice = "direct" if seconds["direct"] <= seconds["fft"] else "fft"
        if sketch.out.family == "block" and seconds.get("shear", math.inf) < seconds[choice]:
            choice = "shear"
    tile = _tile(choice, sketch, device, dtype)
    return LinearPlan(choice, seconds, forced=route != "auto", source=source, tile=tile)


def _estimates(
    rows: int, tokens: int, sketch: TensorSketch, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, float], str]:
    """Seconds by route, and where the speeds behind them come from."""
    if device.type == "cuda" and dtype != torch.float64:
        tuned = tuning.tuned(device)
        return cuda_cost.estimate(rows, tokens, sketch, dtype, tuned.rates), tuned.source
    seconds = _plain_seconds(rows, tokens, sketch, RATES.get(device.type, RATES["cuda"]))
    # torch.compile cannot trace calls of the library; a compiled graph is planned as if it were not there.
    if device.type == "cpu" and not torch.compiler.is_compiling() and native.library() is not None:
        compiled = cost.estimate(rows, tokens, sketch)
        # The compiled transform is for powers of two; other sizes take torch's.
        if not native.supports_fft(sketch.m):
            compiled["fft"] = PLAIN_CALL + seconds["fft"]
        seconds = compiled
    return seconds, SHIPPED_SOURCE


def _tile(route: str, sketch: TensorSketch, device: torch.device, dtype: torch.dtype) -> str:
    """The tile of a GPU kernel in words; empty where there is none to choose, and where nobody can read it."""
    if device.type != "cuda" or route == "fft" or dtype not in common.KERNEL_DTYPES or torch.compiler.is_compiling():
        return ""
    kind = configs.kind(dtype, dtype)
    key = configs.direct_key(sketch.d_out, sketch.d_in, kind) if route == "direct" else f"shear {kind}"
    tuned = tuning.tuned(device)
    return f"{' x '.join(map(str, tuned.tile(key)[:3]))} ({'tuned' if key in tuned.tiles else 'shipped'})"
