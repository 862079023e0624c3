"""The report's sections: text, tables, figures. What a text claims is what was measured, or it says that it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stepinfluence.experiments.base import Result, Run, Section
from stepinfluence.experiments.parity import pictures
from stepinfluence.experiments.parity.clock import LEAST_ONES, Clock
from stepinfluence.experiments.parity.config import Config
from stepinfluence.experiments.parity.profiles import Profiles
from stepinfluence.experiments.parity.proxy import UNSEEN, Scored
from stepinfluence.experiments.parity.readings import Readings

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
    name = run.figure("accuracy", pictures.lengths(accuracies, found["accuracy_lengths"], config.max_digits))
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
    shown = (
        run.figure("profile", pictures.profile(profiles.probe, ours.margin, profiles.peaks, n)),
        run.figure("recurrence", pictures.recurrence(profiles.probe[:n], ours, ours.cosine)),
        run.figure("self-influence", pictures.own_influence(profiles.own)),
    )
    gaps = ", ".join(map(str, np.diff(profiles.peaks))) or "none"
    text = (
        f"Peaks of the summed SDI at steps {', '.join(map(str, profiles.peaks))} (gaps: {gaps}). Share of each "
        f"checkpoint in the absolute profile: {', '.join(percent(s) for s in profiles.share_by_checkpoint)}; period of "
        f"each one's part: {', '.join(lag_text(p) for p in profiles.period_by_checkpoint)}. Autocorrelation at lag "
        f"{config.lag}: {profiles.probe_lag:.2f} for the probe; median over the random test strings "
        f"{profiles.test_lag:.2f}. Self-influence of training strings and their length: Spearman "
        f"{profiles.own_spearman:.2f}."
    )
    return Section("Influence over loop steps", text, shown)


def states(run: Run[Config], ours: Readings) -> Section:
    """Discrete states and their transitions."""
    shown = run.figure("portrait", pictures.portrait(ours))
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
    return Section("Proxy circuit", "\n".join(lines))


def _row(title: str, s: Scored) -> str:
    cells = (percent(s.accuracy), percent(s.agreement), percent(s.coverage), percent(s.selective))
    return f"| {title} | {s.n} | " + " | ".join(cells) + " |"


def what_turns(run: Run[Config], found: Result, turning: Clock, profiles: Profiles, ours: Readings) -> Section:
    """Two hypotheses on where the period comes from, beyond the paper."""
    n = run.config.test_length
    shown = run.figure("clock", pictures.clocks(turning, profiles.test_clock))
    start, end = (float(found[f"running_{side}"][: n - 1].mean()) for side in ("start", "end"))
    ones, right = found["count_ones"], found["count_right"]
    edge = n // 8
    by_share = ", ".join(
        f"{what}: {percent(float(right[rows].mean()))}"
        for what, rows in (
            (f"at most {edge} ones", ones <= edge),
            (f"at most {edge} zeros", ones >= n - edge),
            ("between", (ones > edge) & (ones < n - edge)),
        )
    )
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
        f"{turning.correlation:.3f}, mean absolute difference {turning.error:.3f}, {len(turning.found)} strings of "
        f"{LEAST_ONES} or more ones). {verdict}\n\nThe influence shows the same frequencies without a look at the "
        f"logits: over the summed SDI profiles of random test strings, which differ little in their share of ones, "
        f"slope {profiles.test_clock.slope:.2f}, r = {profiles.test_clock.correlation:.2f}, mean absolute difference "
        f"{profiles.test_clock.error:.3f}.\n\nAccuracy at {n} bits by the number of ones: {by_share}. Random strings "
        f"hardly ever have so few of one kind; accuracy on them, {percent(ours.accuracy)}, does not show it."
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
