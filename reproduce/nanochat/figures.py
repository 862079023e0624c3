"""Figures of the looped language model experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from reproduce.arrays import Array
from reproduce.nanochat.statistics import energy_profile, shares, signed_profile
from reproduce.style import INK, SERIES, SOFT, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def horizons(sdi: Mapping[int, Array]) -> Figure:
    """Cumulative signed share per step at each loop count (Fig. 3), and the shares of absolute influence by distance
    from the last step."""
    import matplotlib as mpl

    made: Figure
    made, axes = figure(1, 2, width=9.4, height=3.8)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.88, len(sdi)))
    for colour, (steps, scores) in zip(colours, sorted(sdi.items()), strict=True):
        t = np.arange(1, steps + 1)
        options = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.3}
        axes[0].plot(t, np.cumsum(shares(signed_profile(scores))), **options)
        axes[0].annotate(str(steps), (steps, 1), (0, 4), textcoords="offset points", ha="center", color=colour)
        axes[1].plot(t - steps, shares(energy_profile(scores)), **options)
    axes[0].axhline(1, color=SOFT, linewidth=0.6)
    axes[0].set_title("Signed, cumulative, by τ", loc="left", pad=12)
    axes[0].set_xlabel("loop step")
    axes[0].set_ylabel("share of total influence")
    axes[1].set_yscale("log")
    low = math.floor(math.log10(axes[1].get_ylim()[0]))
    powers = range(0, low - 1, -max(1, -low // 6))
    axes[1].set_yticks([10.0**p for p in powers], ["1" if p == 0 else f"1e{p}" for p in powers])
    axes[1].minorticks_off()
    axes[1].set_title("Absolute, by distance from the end", loc="left")
    axes[1].set_xlabel("loop step, counted from the last")
    axes[1].set_ylabel("share")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    return made


def variants(sdi: Mapping[str, Mapping[int, Array]], losses: Mapping[str, Array], bptt_k: int | None) -> Figure:
    """Share of the last step against the loop count, and held-out loss against the loop count, per variant.

    Args:
        sdi: variant, loop count -> ``(N, Q, steps)``.
        losses: variant -> nats at 1, 2, ... loop steps.
        bptt_k: of the protocol, marked.
    """
    made: Figure
    made, axes = figure(1, 2, width=9.4, height=3.6)
    for colour, (name, by_steps) in zip(SERIES, sdi.items(), strict=False):
        counts = sorted(by_steps)
        last = [shares(energy_profile(by_steps[c]))[-1] for c in counts]
        axes[0].plot(counts, last, color=colour, marker="o", markersize=4, label=name)
        if name in losses:
            axes[1].plot(np.arange(1, len(losses[name]) + 1), losses[name], color=colour, marker="o", markersize=3)
    every = np.arange(2, max(max(by_steps) for by_steps in sdi.values()) + 1)
    axes[0].plot(every, 1 / every, color=INK, linestyle=":", linewidth=1, label="all steps alike")
    axes[0].set_ylim(0, 1.05)
    axes[0].set_xlabel("loop steps τ")
    axes[0].set_ylabel("share of absolute influence")
    axes[0].set_title("The last step's share", loc="left")
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="upper right")
    if bptt_k is not None:
        axes[1].axvline(bptt_k, color=SOFT, linewidth=0.8, linestyle="--")
    axes[1].set_xlabel("loop steps τ")
    axes[1].set_ylabel("nats per token")
    axes[1].set_title("Held-out loss", loc="left")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    return made
