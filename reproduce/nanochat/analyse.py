"""What the looped language model experiment found: numbers beside the paper's, tables, figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from stepinfluence.models.gpt import LoopedGPTConfig

from reproduce.arrays import Array
from reproduce.base import Comparison, Outcome, Result, Run
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
from reproduce.template import fill

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
        scores: loop count -> what :func:`.measure.influence_by_step` returns.
        loss: of the queries at 1, 2, ... loop steps, last checkpoint; nats per token.
        loop: contraction of the loop and weight of its state (:func:`.dynamics.dynamics`).
    """

    variant: Variant
    history: list[list[float]]
    scores: Mapping[int, Result]
    loss: list[float]
    loop: Mapping[str, float]

    @property
    def sdi(self) -> dict[int, Array]:
        """Loop count -> ``(N, Q, steps)``."""
        return {steps: found["sdi"] for steps, found in self.scores.items()}


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
    run.figure("horizons", figures.horizons(protocol.sdi))
    profiles = {n: f.sdi for n, f in found.items()}
    losses = {n: np.array(f.loss) for n, f in found.items() if f.variant.trained}
    run.figure("variants", figures.variants(profiles, losses, protocol.variant.bptt_k))
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
    text = fill("nanochat", _values(config, corpus, found, rows, fits), {"count": _millions, "range": _range})
    return Outcome(
        title="Where influence sits in a looped language model",
        summary=text.summary,
        comparisons=tuple(comparisons),
        numbers=numbers,
        body=text.body,
    )


def _values(
    config: Config,
    corpus: Corpus,
    found: Mapping[str, Found],
    rows: Mapping[str, Rows],
    fits: Mapping[int, Growth | None],
) -> dict[str, Any]:
    """What the report speaks of."""
    protocol = found[config.variants[0].name]
    own, deep = rows[protocol.variant.name], max(protocol.sdi)
    tail = [row[1] for row in protocol.history[-max(1, len(protocol.history) // 10) :]]
    return {
        "config": config,
        "corpus": corpus,
        "protocol": protocol,
        "found": found,
        "rows": rows,
        "own": own,
        "last": {t: row["last"] for t, row in own.items()},
        "fits": fits,
        "deep": deep,
        "others": [n for n in found if n != protocol.variant.name and deep in rows[n]],
        "common": sorted(set.intersection(*(set(r) for r in rows.values()))),
        "some_untrained": any(not f.variant.trained for f in found.values()),
        "parameters": parameters(config.model),
        "body_parameters": body_parameters(config.model),
        "end_loss": np.mean(tail),
        "end_bits": np.mean(tail) / math.log(2),
    }


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


def _shape(fit: Growth | None) -> str:
    if fit is None:
        return "no fit"
    single = "" if fit.r_squared >= POOR else " (no single rate)"
    return f"growth of {fit.ratio:.2f} per step, R² {fit.r_squared:.2f}{single}"


def _plateau(loss: list[float]) -> str:
    at = min(4, len(loss)) - 1
    return f"{loss[at]:.3f}; best {min(loss[at:]):.3f}, worst {max(loss[at:]):.3f}"
