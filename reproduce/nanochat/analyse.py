"""What the looped language model experiment found: numbers beside the paper's, tables, figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from stepinfluence.models.gpt import LoopedGPTConfig

from reproduce.base import Comparison, Outcome, Run, Section
from reproduce.nanochat import figures
from reproduce.nanochat.config import Config, Variant
from reproduce.nanochat.corpus import Corpus
from reproduce.nanochat.statistics import (
    Growth,
    cancellation,
    energy_profile,
    growth,
    last_share_interval,
    shares,
    signed_profile,
)

Array = NDArray[np.float64]
POOR = 0.9
"""R squared of a geometric fit under which one rate does not describe the profile."""
Row: TypeAlias = Mapping[str, float]
Rows: TypeAlias = Mapping[int, Row]


@dataclass(frozen=True)
class Found:
    """Results of one variant.

    Attributes:
        variant: which.
        history: update, training loss (nats), loop count.
        sdi: loop count -> ``(N, Q, steps)``.
        loss: of the queries at 1, 2, ... loop steps, last checkpoint; nats per token.
        loop: contraction of the loop and weight of its state (:func:`.dynamics.dynamics`).
    """

    variant: Variant
    history: list[list[float]]
    sdi: Mapping[int, Array]
    loss: list[float]
    loop: Mapping[str, float]


def outcome(run: Run[Config], corpus: Corpus, found: Mapping[str, Found]) -> Outcome:
    """Everything the report shows."""
    config = run.config
    protocol = found[config.variants[0].name]
    rows = {name: {t: _row(sdi, config.seed) for t, sdi in f.sdi.items()} for name, f in found.items()}
    own = rows[protocol.variant.name]
    last = {t: row["last"] for t, row in own.items()}
    fits = {t: growth(energy_profile(s)) for t, s in protocol.sdi.items()}
    deep = max(protocol.sdi)
    four = {t: row["last_four"] for t, row in own.items() if t > 4}
    here = f"{_count(config)} parameters against 328.3M, {len(protocol.history)} updates"
    comparisons = [
        Comparison("share of the last step, signed, by τ", _range(last), "usually ≥ 0.50", "§4, Fig. 3", here),
        Comparison(f"share of the last step at τ = {deep}, 95 % interval over queries",
                   f"{own[deep]['low']:.2f} to {own[deep]['high']:.2f}"),
        Comparison(f"shape of the absolute profile, τ = {deep}", _shape(fits.get(deep)), "approximately geometric",
                   "Fig. 3",
                   "half on the last step is a growth of 2; the core shrinks changes of its state by "
                   f"{1 / protocol.loop['contraction']:.2g}"),
    ]  # fmt: skip
    if four:
        comparisons.append(
            Comparison("share of the last four steps, signed, by τ > 4", _range(four), "almost all", "§4",
                       "the paper: built up \"within these last loop steps\", whatever τ")
        )  # fmt: skip
    comparisons.append(
        Comparison("held-out loss at 4 loop steps, and at most beyond", _plateau(protocol.loss), "plateau beyond τ = 4",
                   "§4", "nats per token; the paper: task accuracy on GSM8K")
    )  # fmt: skip
    shown = (
        run.figure("horizons", figures.horizons(protocol.sdi)),
        run.figure(
            "variants",
            figures.variants(
                {n: f.sdi for n, f in found.items()},
                {n: np.array(f.loss) for n, f in found.items() if f.variant.trained},
                protocol.variant.bptt_k,
            ),
        ),
    )
    sections = [
        Section("Influence by loop step", _profile_text(config, own, fits), (shown[0],)),
        Section("What makes the profile", _variants_text(rows, found), (shown[1],)),
        Section("Model, data and training", _setting(config, corpus, protocol)),
    ]
    numbers = {
        "data": {"name": corpus.name, "digest": corpus.digest},
        "profiles": {
            name: {
                str(t): {
                    "signed": signed_profile(s).tolist(), "absolute": energy_profile(s).tolist(), **rows[name][t]
                }
                for t, s in f.sdi.items()
            }
            for name, f in found.items()
        },
        "growth": {str(t): vars(fit) if fit else None for t, fit in fits.items()},
        "loop": {name: dict(f.loop) for name, f in found.items()},
        "loss_by_depth": {name: f.loss for name, f in found.items()},
        "history": {name: f.history for name, f in found.items()},
    }  # fmt: skip
    title = "Where influence sits in a looped language model"
    return Outcome(title, _summary(config, protocol, own, rows, found), tuple(comparisons), tuple(sections), numbers)


def _row(sdi: Array, seed: int) -> Row:
    """The figures of one variant at one loop count."""
    signed, absolute = shares(signed_profile(sdi)), shares(energy_profile(sdi))
    low, high = last_share_interval(sdi, seed=seed)
    return {
        "last": float(signed[-1]),
        "last_four": float(signed[-4:].sum()),
        "last_absolute": float(absolute[-1]),
        "last_four_absolute": float(absolute[-4:].sum()),
        "low": low,
        "high": high,
        "cancellation": cancellation(sdi),
    }


def _summary(
    config: Config,
    protocol: Found,
    own: Rows,
    rows: Mapping[str, Rows],
    found: Mapping[str, Found],
) -> str:
    deep = max(protocol.sdi)
    text = (
        f"A recursive nanochat of {_count(config)} parameters, trained on real text with backpropagation truncated to "
        f"{protocol.variant.bptt_k} loop steps, attributed with full backpropagation at {min(protocol.sdi)} to {deep} "
        f"loop steps. The last step holds {_range({t: r['last'] for t, r in own.items()})} of the signed influence, "
        "depending on the number of steps; the paper finds at least half."
    )
    others = [n for n in found if n != protocol.variant.name and deep in rows[n]]
    if others:
        text += f" Share of the last step in absolute influence at τ = {deep}: {own[deep]['last_absolute']:.2f}, " + (
            ", ".join(f"{rows[n][deep]['last_absolute']:.2f} ({n})" for n in others) + ". "
        )
        text += " ".join(_conclusion(rows[n][deep], deep) for n in others if not found[n].variant.trained)
    return text.strip()


def _conclusion(untrained: Row, deep: int) -> str:
    """What a model that has learned nothing says about the paper's step counter."""
    share = untrained["last_four_absolute"]
    if share >= 0.5:
        return (
            f"An untrained model has {share:.2f} of its absolute influence in the last four of {deep} steps, too: a "
            "concentration at the end does not by itself show that a model has learned to count its steps."
        )
    return f"An untrained model has {share:.2f} of its absolute influence in the last four of {deep} steps."


def _profile_text(config: Config, own: Rows, fits: Mapping[int, Growth | None]) -> str:
    intro = (
        f"{config.train_examples} training examples on {config.query_examples} held-out ones, influence summed over "
        "the checkpoints of the last stage with their learning rates. *Signed* adds all pairs with their sign, as in "
        "the paper's Figure 3; *absolute* adds magnitudes, so that pairs do not cancel. *Net* is the magnitude of the "
        "sum of all influences over the sum of magnitudes."
    )
    columns = "τ | last step, signed | 95 % interval | last four, signed | last step, absolute | net"
    lines = [intro, "", f"| {columns} | growth per step | R² |", "|---|---|---|---|---|---|---|---|"]
    for t, row in sorted(own.items()):
        fit = fits.get(t)
        rate = f"{fit.ratio:.2f} ({fit.low:.2f} to {fit.high:.2f}) | {fit.r_squared:.2f}" if fit else "– | –"
        lines.append(
            f"| {t} | {row['last']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['last_four']:.3f} | "
            f"{row['last_absolute']:.3f} | {row['cancellation']:.2f} | {rate} |"
        )
    outro = (
        "Growth per step is the ratio of a geometric fit to the absolute profile, with its 95 % interval; none is "
        "fitted to fewer than four steps. A ratio of 2 or more gives the last step half of the total."
    )
    return "\n".join([*lines, "", outro])


def _variants_text(rows: Mapping[str, Rows], found: Mapping[str, Found]) -> str:
    if len(found) == 1:
        return "This run has the protocol only; the smaller scales compare it with variants."
    counts = sorted(set.intersection(*(set(r) for r in rows.values())))
    intro = (
        "The paper's hypothesis is that the model has learned to count loop steps: it “knows what the four last loop "
        "steps are”. Each variant changes one thing: *full backpropagation* trains without truncation; *normalised "
        "state* normalises the state after each step, but not the prelude output that enters beside it; *random "
        "adapter* starts with an adapter that mixes state and prelude output, where the protocol's at first passes the "
        "prelude output on and ignores the state; *untrained* has random weights throughout."
    )
    loops = "core shrinks a change of state by | state over input in the adapter"
    heads = " | ".join(f"last step, τ = {t} | last four, τ = {t}" for t in counts)
    lines = [
        intro,
        "",
        f"| variant | held-out loss, τ = 4 | {heads} | {loops} |",
        "|---|---|---|---|" + "---|---|" * len(counts),
    ]
    for name, row in rows.items():
        loss, loop = found[name].loss, found[name].loop
        cells = [f"{row[t]['last_absolute']:.2f} | {row[t]['last_four_absolute']:.2f}" for t in counts]
        lines.append(f"| {name} | {loss[min(4, len(loss)) - 1]:.3f} | " + " | ".join(cells) + f" | {_times(loop)} |")
    outro = (
        "Shares of absolute influence; losses in nats per token. The signal of step t comes back from the last step "
        "through τ - t applications of the core: where the core shrinks small changes of its state, early steps lose "
        "influence, trained or not, counted from the end and whatever τ is. The last two columns measure this "
        "forwards: the factor by which one application shrinks a small random change (geometric mean of two, last "
        "checkpoint), and how large the adapter's output from the state is against that from the prelude."
    )
    if any(not f.variant.trained for f in found.values()):
        outro += " What training adds is the difference to *untrained*."
    return "\n".join([*lines, "", outro])


def _setting(config: Config, corpus: Corpus, protocol: Found) -> str:
    m = config.model
    tail = [row[1] for row in protocol.history[-max(1, len(protocol.history) // 10) :]]
    data = (
        f"Text: {corpus.name}, digest `{corpus.digest}`; {len(corpus.documents[0])} documents to train on and "
        f"{len(corpus.documents[1])} held out; {len(corpus.conversations[0])} and {len(corpus.conversations[1])} "
        f"conversations. Influence is that of {'conversations' if corpus.fine_tuned else 'passages of documents'}. "
        f"{len(protocol.history)} updates of {config.batch} examples; training loss of the last tenth "
        f"{np.mean(tail):.3f} nats per token ({np.mean(tail) / math.log(2):.2f} bits)."
    )
    model = (
        f"Prelude {m.n_prelude}, core {m.n_core}, coda {m.n_coda} blocks of width {m.d_model}, {m.n_heads} heads, "
        f"{m.sequence_len} tokens, vocabulary of {m.vocab_size} ({config.tokenizer}): {_count(config)} parameters, "
        f"{_millions(body_parameters(m))} of them in core and adapter. Loop counts in training from the "
        f"Poisson-log-normal distribution with mean {config.mean_loops:g}, at most {config.max_loops}; "
        f"backpropagation through the last {protocol.variant.bptt_k} steps. Muon for matrices (learning rate "
        f"{config.matrix_lr:g}) and AdamW for embedding and head, as in nanochat."
    )
    difference = (
        "Against the paper: its model has 328.3M parameters, trained on billions of tokens in three stages, and its "
        "figure is about conversations of GSM8K. `--data FILE` trains on conversations, too, with the assistant's "
        "tokens as targets."
    )
    return "\n\n".join((model, data, difference))


def parameters(m: LoopedGPTConfig) -> int:
    """Parameters of the model: embedding, head, all blocks, adapter."""
    return 2 * m.vocab_size * m.d_model + (m.n_prelude + m.n_coda) * _block(m) + body_parameters(m)


def body_parameters(m: LoopedGPTConfig) -> int:
    """Parameters of core and adapter, which influence is measured on."""
    return m.n_core * _block(m) + 2 * m.d_model**2


def _block(m: LoopedGPTConfig) -> int:
    return (4 + 2 * m.mlp_ratio) * m.d_model**2


def _count(config: Config) -> str:
    return _millions(parameters(config.model))


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"


def _range(values: Mapping[int, float]) -> str:
    numbers = list(values.values())
    return f"{min(numbers):.3f} to {max(numbers):.3f}"


def _times(loop: Mapping[str, float]) -> str:
    return f"{1 / loop['contraction']:.2g} | {loop['state_over_input']:.2g}"


def _shape(fit: Growth | None) -> str:
    if fit is None:
        return "no fit"
    single = "" if fit.r_squared >= POOR else " (no single rate)"
    return f"growth of {fit.ratio:.2f} per step, R² {fit.r_squared:.2f}{single}"


def _plateau(loss: list[float]) -> str:
    at = min(4, len(loss)) - 1
    return f"{loss[at]:.3f}; best {min(loss[at:]):.3f}, worst {max(loss[at:]):.3f}"
