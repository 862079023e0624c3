"""Figures of the parity experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from stepinfluence.attribution.periods import autocorrelation

from reproduce.arrays import Array, Integers
from reproduce.parity.clock import Clock
from reproduce.parity.readings import Readings
from reproduce.style import ACCENT, FAINT, INK, SERIES, SOFT, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def profile(every: Array, late: Array, margin: Array, peaks: Integers, read_out: int) -> Figure:
    """Summed SDI and logit margin over loop steps, with peaks and the read-out step (Fig. 1A).

    Args:
        every, late: SDI summed over all checkpoints, and over those from the end of the curriculum on, ``(T,)``.
        margin: ``(T,)``.
        peaks: 1-based steps of the peaks of ``late``.
        read_out: 1-based step.
    """
    made: Figure
    made, axes = figure(3, 1, width=9.0, height=6.0, sharex=True)
    steps = np.arange(1, len(late) + 1)
    rows = (
        ("Summed SDI, checkpoints from the end of the curriculum on", late, SERIES[0]),
        ("Logit margin", margin, SERIES[1]),
        ("Summed SDI, all checkpoints", every, SERIES[5]),
    )
    for axis, (name, values, colour) in zip(axes, rows, strict=True):
        for peak in peaks:
            axis.axvline(peak, color=FAINT, linewidth=1.2, zorder=0)
        axis.axvline(read_out, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axis.axhline(0, color=SOFT, linewidth=0.6, zorder=1)
        axis.plot(steps, values, color=colour, marker="o", markersize=3, linewidth=1.4)
        axis.set_title(name, loc="left")
    axes[-1].set_xlabel(f"loop step (0101… of {read_out} bits; grey: peaks of the first row, dotted: read-out)")
    return made


def portrait(readings: Readings) -> Figure:
    """The probe's states in the plane of two principal components, by k-means state, and transitions (Fig. 1B)."""
    made: Figure
    made, (left, right) = figure(1, 2, width=9.0, height=4.0, width_ratios=(1.5, 1))
    plane, states = readings.plane, readings.states
    left.plot(plane[:, 0], plane[:, 1], color=FAINT, linewidth=1, zorder=0)
    count = len(readings.matrix)
    for state in range(count):
        rows = states == state
        left.scatter(*plane[rows].T, color=SERIES[state], s=26, label=f"state {state + 1}", zorder=2)
    for step in (1, len(plane)):
        left.annotate(str(step), plane[step - 1], xytext=(5, 5), textcoords="offset points", color=SOFT, fontsize=8)
    left.set_xlabel("principal component 1")
    left.set_ylabel(f"principal component 2 (both: {100 * readings.explained:.0f} % of variance)")
    left.set_title("State at the answer token after each step", loc="left")
    left.legend(fontsize=8)
    right.imshow(readings.matrix, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(readings.matrix):
        right.text(column, row, f"{value:.2f}".rstrip("0").rstrip("."), ha="center", va="center",
                   color="white" if value > 0.5 else INK)  # fmt: skip
    ticks = range(count), [str(k + 1) for k in range(count)]
    right.set_xticks(*ticks)
    right.set_yticks(*ticks)
    right.set_xlabel("next state")
    right.set_ylabel("state")
    right.set_title("Transition probabilities", loc="left")
    return made


def recurrence(sdi: Array, readings: Readings, cosine: Mapping[int, float]) -> Figure:
    """Autocorrelation of SDI and margin, and mean cosine of states, by lag.

    Args:
        sdi: up to the read-out, ``(n,)``.
        readings: of the model.
        cosine: by lag.
    """
    made: Figure
    made, (left, right) = figure(1, 2, width=9.0, height=3.4)
    longest = len(sdi) // 2
    named = {"summed SDI": sdi, "logit margin": readings.margin[: len(sdi)]}
    for (name, values), colour in zip(named.items(), SERIES, strict=False):
        left.plot(autocorrelation(values)[: longest + 1], color=colour, marker="o", markersize=3, label=name)
    left.axhline(0, color=SOFT, linewidth=0.6)
    left.set_xticks(range(0, longest + 1, 4))
    left.set_xlabel("lag in loop steps")
    left.set_title("Autocorrelation", loc="left")
    left.legend()
    right.bar(list(cosine), list(cosine.values()), color=ACCENT, width=0.6)
    right.axhline(0, color=SOFT, linewidth=0.6)
    right.set_xticks(list(cosine))
    right.set_xlabel("lag in loop steps")
    right.set_title("Mean cosine of hidden states", loc="left")
    return made


def clocks(logits: Clock, influence: Clock) -> Figure:
    """Frequency found against half the share of ones, for logits and for summed SDI."""
    made: Figure
    made, axes = figure(1, 2, width=9.0, height=3.8, sharex=True, sharey=True)
    for axis, one, title in zip(
        axes, (logits, influence), ("Logits, every number of ones", "Summed SDI, random test strings"), strict=True
    ):
        axis.plot([0, 0.5], [0, 0.5], color=SOFT, linestyle=":", label="a clock that is right at the read-out")
        axis.scatter(one.expected, one.found, s=12, alpha=0.6, color=SERIES[0], linewidth=0, label="found")
        if len(one.found_outside):
            axis.scatter(one.expected_outside, one.found_outside, s=12, facecolor="none", edgecolor=SERIES[1],
                         linewidth=0.7, label="found, less than an eighth of one bit")  # fmt: skip
        axis.set_xlabel("half the share of ones")
        axis.set_title(title, loc="left")
    axes[0].set_ylabel("cycles per loop step")
    axes[0].legend()
    return made


def lengths(accuracy: Mapping[int, Array], found_at: Array, top: int) -> Figure:
    """Accuracy by length, one line for each training run.

    Args:
        accuracy: by seed, ``(lengths,)``.
        found_at: the lengths.
        top: longest in training.
    """
    made: Figure
    made, axis = figure(width=7.0, height=3.2)
    axis.axvspan(0.5, top + 0.5, color=FAINT, alpha=0.5, linewidth=0)
    for colour, (seed, values) in zip(SERIES * 4, accuracy.items(), strict=False):
        axis.plot(found_at, 100 * values, marker="o", markersize=3, color=colour, label=f"seed {seed}")
    axis.axhline(50, color=SOFT, linestyle=":", linewidth=1)
    axis.set_ylim(-3, 104)
    axis.set_xlabel("bits (shaded: lengths of training; dotted: guessing)")
    axis.set_ylabel("accuracy, %")
    axis.legend(loc="lower left")
    return made


def own_influence(by_length: Mapping[int, Any]) -> Figure:
    """Self-influence of training strings by loop step and length, each length's maximum 1."""
    made: Figure
    made, axis = figure(width=7.0, height=3.4)
    chosen = sorted(by_length)
    grid = np.full((len(chosen), max(chosen)), np.nan)
    for row, length in enumerate(chosen):
        values = np.asarray(by_length[length])[:length]
        grid[row, :length] = values / max(float(np.abs(values).max()), np.finfo(float).tiny)
    shown = axis.imshow(
        grid, aspect="auto", origin="lower", cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest",
        extent=(0.5, grid.shape[1] + 0.5, -0.5, len(chosen) - 0.5),
    )  # fmt: skip
    every = max(1, len(chosen) // 10)
    axis.set_yticks(range(0, len(chosen), every), [str(length) for length in chosen[::every]])
    axis.set_xticks(range(1, grid.shape[1] + 1, max(1, grid.shape[1] // 10)))
    axis.set_xlabel("loop step")
    axis.set_ylabel("bits of the string")
    axis.set_title("Mean self-influence, relative to the length's largest", loc="left")
    made.colorbar(shown, ax=axis)
    return made
