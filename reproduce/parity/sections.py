"""The report's sections: text, tables, figures. What a text claims is what was measured, or it says that it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from reproduce.base import Result, Run, Section
from reproduce.parity import figures
from reproduce.parity.clock import Clock
from reproduce.parity.config import Config
from reproduce.parity.profiles import Profiles
from reproduce.parity.proxy import UNSEEN, Scored
from reproduce.parity.readings import Readings

PAPER_MATRIX = ((0, 0, 1, 0), (0, 0.09, 0, 0.91), (0, 1, 0, 0), (1, 0, 0, 0))
"""The paper's transition matrix (section 4); the numbering of states is arbitrary."""

SETS = {
    "alternating": "alternating, drawn as in the paper (lengths 2 to {n})",
    "in_distribution": "… of at most {top} bits",
    "out_of_distribution": "… of more than {top} bits",
    "other_phase": "1010… by a table learned on 0101… alone",
    "longer": "alternating, {n} < bits ≤ {beyond}",
    "test": "random test strings of {n} bits",
}


def lag_text(lag: int) -> str:
    """A period for people."""
    return str(lag) if lag else "none"


def percent(share: float) -> str:
    """A share for people."""
    return "–" if np.isnan(share) else f"{100 * share:.1f} %"


def training(run: Run[Config], trained: Result, found: Result, accuracies: Mapping[int, Any]) -> Section:
    """The model and its accuracy by length."""
    config = run.config.training
    name = run.figure("accuracy", figures.lengths(accuracies, found["accuracy_lengths"], config.max_digits))
    text = (
        f"Width {config.model.d_model}, {config.model.n_heads} heads, {trained['parameters']} parameters "
        f"({trained['body_parameters']} in the loop body); {trained['steps']} optimizer steps of {config.batch_size} "
        f"strings out of {config.train_per_length} of each length (all there are, where fewer); the curriculum was "
        f"{'completed' if trained['complete'] else 'NOT completed'}. Checkpoints when lengths "
        f"{', '.join(map(str, trained['digits']))} had been mastered ({', '.join(trained['files'])}). The paper's "
        "model has width 256 and 64 heads, and is trained as by Fan et al.: profile `paper`."
    )
    return Section("The model", text, (name,))


def influence(run: Run[Config], profiles: Profiles, ours: Readings) -> Section:
    """The summed profile, its period, and self-influence."""
    config = run.config
    n = config.test_length
    late = profiles.trained
    shown = (
        run.figure("profile", figures.profile(profiles.all.values, late.values, ours.margin, late.peaks, n)),
        run.figure("recurrence", figures.recurrence(late.values[:n], ours, ours.cosine)),
        run.figure("self-influence", figures.own_influence(profiles.own)),
    )
    gaps = ", ".join(map(str, np.diff(late.peaks))) or "none"
    shares = ", ".join(percent(s) for s in profiles.share_by_checkpoint)
    periods = ", ".join(lag_text(p) for p in profiles.period_by_checkpoint)
    largest = max(profiles.share_by_checkpoint)
    warning = (
        f" One checkpoint has {percent(largest)} of the sum over all: halfway through the curriculum, gradients "
        f"through {n} loop steps of a model that was trained for far fewer can be very large, and a sum over "
        "checkpoints shows that model."
        if largest > 0.5
        else ""
    )
    text = (
        f"Share of each checkpoint in the absolute profile: {shares}; period of each one's part: {periods}.{warning} "
        f"What follows is of the {profiles.n_trained} checkpoint(s) from the end of the curriculum on. Peaks of the "
        f"summed SDI at steps {', '.join(map(str, late.peaks))} (gaps: {gaps}). Autocorrelation at lag {config.lag}: "
        f"{profiles.probe_lag:.2f} for the probe; median over the random test strings {profiles.test_lag:.2f}. "
        f"Self-influence of training strings and their length: Spearman {profiles.own_spearman:.2f}."
    )
    return Section("Influence over loop steps", text, shown)


def states(run: Run[Config], ours: Readings) -> Section:
    """Discrete states and their transitions."""
    shown = run.figure("portrait", figures.portrait(ours))
    rows = "\n".join(f"| {k + 1} | " + " | ".join(f"{v:.2f}" for v in row) + " |" for k, row in enumerate(ours.matrix))
    head = "| from \\ to | " + " | ".join(str(k + 1) for k in range(len(ours.matrix))) + " |"
    best = max(ours.silhouette, key=lambda k: ours.silhouette[k])
    paper = "; ".join(" ".join(f"{v:g}" for v in row) for row in PAPER_MATRIX)
    silhouettes = ", ".join(f"k = {k}: {v:.2f}" for k, v in ours.silhouette.items())
    text = (
        f"{head}\n|{'---|' * (len(ours.matrix) + 1)}\n{rows}\n\nStates are numbered by their first visit. The dominant "
        f"cycle is {' → '.join(str(k + 1) for k in ours.cycle) or 'none'}. The paper's matrix, in its own numbering: "
        f"{paper}. Silhouette by number of clusters: {silhouettes}; highest at k = {best}."
    )
    return Section("Discrete states", text, (shown,))


def proxy_circuit(config: Config, ours: Readings) -> Section:
    """The lookup table, and accuracy by set of strings."""
    values = {"n": config.test_length, "top": config.training.max_digits, "beyond": config.beyond}
    table = zip(ours.proxy.counts, ours.proxy.lookup, strict=True)
    note = (
        f"There are two alternating strings of a length, so {config.evaluation} draws to judge by and "
        f"{config.calibration} to learn from share theirs, here as in the paper. In the fourth and fifth rows no "
        f"string is among those the table was learned on. Threshold: distance {ours.proxy.threshold:.3g}, the "
        f"{100 * config.quantile:g}th percentile on the calibration set."
    )
    lines = [
        "| state | calibration strings of parity 0 | of parity 1 | table says |",
        "|---|---|---|---|",
        *(
            f"| {k + 1} | {even} | {odd} | {'not seen' if say == UNSEEN else say} |"
            for k, ((even, odd), say) in enumerate(table)
        ),
        "",
        "| strings | n | accuracy | agrees with the model | within the threshold | accuracy there |",
        "|---|---|---|---|---|---|",
        *(_row(title.format(**values), ours.scores[name]) for name, title in SETS.items()),
        "",
        note,
    ]
    unseen = int((ours.proxy.lookup == UNSEEN).sum())
    if unseen:
        lines += ["", f"{unseen} of the states are never what an alternating string is read out in."]
    return Section("Proxy circuit", "\n".join(lines))


def _row(title: str, s: Scored) -> str:
    cells = (percent(s.accuracy), percent(s.agreement), percent(s.coverage), percent(s.selective))
    return f"| {title} | {s.n} | " + " | ".join(cells) + " |"


def what_turns(run: Run[Config], found: Result, turning: Clock, profiles: Profiles, ours: Readings) -> Section:
    """Two hypotheses on where the period comes from, beyond the paper."""
    n = run.config.test_length
    shown = run.figure("clock", figures.clocks(turning, profiles.test_clock))
    start, end = (float(found[f"running_{side}"][: n - 1].mean()) for side in ("start", "end"))
    ones, right = found["count_ones"], found["count_right"]
    wrong = [int(k) for k in np.unique(ones) if right[ones == k].mean() < 0.5]
    away = np.abs(turning.found_outside - turning.expected_outside)
    outside = f" Outside of that range the mean difference is {away.mean():.3f}." if len(away) else ""
    verdict = (
        "This is how such a clock does parity: turning by π · ones / n at each of n steps, it has turned by π for each "
        "one when it is read. An alternating string has half its bits set, hence a quarter turn at each step, period "
        "4, and four states which are four points of a rotation, not memory of what was read."
        if turning.keeps_time
        else "That is no clock that goes by the share of ones: this model does not show where a period would come from."
    )
    text = (
        "Beyond the paper. An automaton that reads a bit at each step would show the parity of the bits read so far. "
        "Before the read-out, the logits of random test strings say the parity of the first t bits in "
        f"{percent(start)} of cases and of the last t in {percent(end)} (guessing: 50 %).\n\n"
        "Instead, take strings of every number of ones. Those with as many in another order end at states with a mean "
        "cosine of "
        f"{found['count_cosine'].mean():.3f}. The frequency of their logits goes with half the share of ones, in "
        f"cycles for each loop step, by slope {turning.slope:.2f} and intercept {turning.intercept:.3f} (r = "
        f"{turning.correlation:.3f}, mean absolute difference {turning.error:.3f}; {len(turning.found)} strings with "
        f"at least an eighth of either bit).{outside} {verdict}\n\n"
        "The influence shows the same without a look at the logits: over the "
        "summed SDI profiles of random test strings, which differ little in their share of ones, slope "
        f"{profiles.test_clock.slope:.2f}, r = {profiles.test_clock.correlation:.2f}, mean absolute difference "
        f"{profiles.test_clock.error:.3f} cycles a step.\n\n"
        f"Strings of {n} bits that are answered wrongly in most orders have this many ones: "
        f"{_ranges(wrong) or 'none'}. Random strings mostly have about as many of either bit, so the accuracy on them, "
        f"{percent(ours.accuracy)}, says little about these. A clock that is slow or fast by d cycles a step is off by "
        "n d cycles when it is read: what is right at the lengths of training can fail at longer ones, and first where "
        "the share of ones is unusual."
    )
    return Section("Where the period comes from", text, (shown,))


def other_runs(config: Config, readings: Mapping[int, Readings], clocks: Mapping[int, Clock]) -> Section:
    """The same measurements on models of other seeds."""
    heads = (
        "seed", f"accuracy, {config.test_length} bits", "margin period", f"cosine, lag {config.lag}",
        "states in the cycle", "likeliest transitions", "proxy, longer alternating", "proxy, random test",
        "clock: slope", "r",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for seed, one in readings.items():
        cells = (
            str(seed), percent(one.accuracy), lag_text(one.margin_period.lag),
            f"{one.cosine.get(config.lag, float('nan')):.3f}", str(len(one.cycle)), percent(one.determinism),
            percent(one.scores["out_of_distribution"].accuracy), percent(one.scores["test"].accuracy),
            f"{clocks[seed].slope:.2f}", f"{clocks[seed].correlation:.3f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return Section("Training runs by seed", "\n".join(lines))


def _ranges(numbers: list[int]) -> str:
    """``0, 2, 28-33``."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)
