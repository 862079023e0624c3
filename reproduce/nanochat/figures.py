"""Figures of the looped language model experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from reproduce.arrays import Array
from reproduce.nanochat.statistics import (
    draws,
    energy_by_query,
    energy_profile,
    shares,
    signed_by_query,
    signed_profile,
)
from reproduce.style import INK, SERIES, SOFT, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def horizons(sdi: Mapping[int, Array]) -> Figure:
    """Cumulative signed share per step at each loop count (Fig. 3), and the shares of absolute influence by distance
    from the last step."""
    made: Figure
    made, axes = figure(1, 2, width=9.4, height=3.8)
    colours = _colours(len(sdi))
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
    _log_shares(axes[1])
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
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="best")
    if bptt_k is not None:
        axes[1].axvline(bptt_k, color=SOFT, linewidth=0.8, linestyle="--")
    axes[1].set_xlabel("loop steps τ")
    axes[1].set_ylabel("nats per token")
    axes[1].set_title("Held-out loss", loc="left")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    return made


def beside(sets: Mapping[str, Mapping[int, Array]], seed: int) -> Figure:
    """Shares of each loop step from the first on, signed above and absolute below, one column a set of scores; bands
    are 95 % intervals over queries.

    Args:
        sets: name, loop count -> ``(N, Q, steps)``.
        seed: of the draws of queries.
    """
    made: Figure
    made, axes = figure(2, len(sets), width=3.4 * len(sets), height=5.6, sharex=True, sharey="row", squeeze=False)
    ends: list[float] = []
    for column, (name, by_steps) in enumerate(sets.items()):
        for colour, (steps, scores) in zip(_colours(len(by_steps)), sorted(by_steps.items()), strict=True):
            t, drawn = np.arange(1, steps + 1), draws(scores.shape[1], seed=seed)
            for axis, by_query in zip(axes[:, column], (signed_by_query(scores), energy_by_query(scores)), strict=True):
                resampled = drawn @ by_query
                low, high = np.percentile(resampled / resampled.sum(1, keepdims=True), [2.5, 97.5], axis=0)
                axis.fill_between(t, low, high, color=colour, alpha=0.18, linewidth=0)
                axis.plot(t, shares(by_query.sum(0)), color=colour, marker="o", markersize=3, linewidth=1.2,
                          label=f"τ = {steps}")  # fmt: skip
        axes[0, column].set_title(name, loc="left")
        axes[0, column].axhline(0, color=SOFT, linewidth=0.6)
        lines = [value for line in axes[0, column].get_lines() for value in line.get_ydata()]
        ends += [min(lines), max(lines)]
        axes[1, column].set_xlabel("loop step")
    axes[0, 0].set_ylabel("share, signed")
    axes[1, 0].set_ylabel("share, absolute")
    _log_shares(axes[1, 0])
    # Where the sum is close to zero, shares of it can be anything: such bands leave the picture.
    axes[0, 0].set_ylim(min(ends) - 0.25, max(ends) + 0.25)
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].xaxis.get_major_locator().set_params(integer=True)
    return made


def checkpoints(scores: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Along the last stage: the last step's share of absolute influence at each checkpoint, and how much of the summed
    influence the checkpoint has.

    Args:
        scores: loop count -> ``by_checkpoint`` and ``checkpoints`` of :func:`.measure.influence_by_step`.
    """
    made: Figure
    made, axes = figure(1, 2, width=9.4, height=3.4)
    for colour, (steps, found) in zip(_colours(len(scores)), sorted(scores.items()), strict=True):
        updates = [int(name.removesuffix(".pt").rpartition("-")[2]) for name in found["checkpoints"]]
        energy = np.asarray(found["by_checkpoint"], dtype=np.float64)
        options = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.2}
        axes[0].plot(updates, energy[:, -1] / energy.sum(1), label=f"τ = {steps}", **options)
        axes[1].plot(updates, energy.sum(1) / energy.sum(), **options)
    axes[0].set_title("The last step's share, absolute", loc="left")
    axes[1].set_title("Share of each checkpoint in the sum", loc="left")
    axes[0].set_ylim(0, 1.05)
    axes[1].set_ylim(0, None)
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=8)
    for axis in axes:
        axis.set_xlabel("update of the last stage")
    return made


def _colours(count: int) -> Array:
    import matplotlib as mpl

    found: Array = mpl.colormaps["viridis"](np.linspace(0, 0.88, count))
    return found


def _log_shares(axis: Any) -> None:
    """A logarithmic axis of shares, marked at powers of ten."""
    axis.set_yscale("log")
    low = math.floor(math.log10(axis.get_ylim()[0]))
    powers = range(0, low - 1, -max(1, -low // 6))
    axis.set_yticks([10.0**p for p in powers], ["1" if p == 0 else f"1e{p}" for p in powers])
    axis.minorticks_off()
