"""What the looped language model experiment found: numbers beside the paper's, tables, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from stepinfluence.models.gpt import LoopedGPTConfig

from reproduce.arrays import Array
from reproduce.base import Comparison, Outcome, Result, Run
from reproduce.nanochat import figures
from reproduce.nanochat.config import Config, Variant
from reproduce.nanochat.corpus import Corpus
from reproduce.nanochat.distance import distances, millions
from reproduce.nanochat.statistics import (
    GOOD_FIT,
    Estimate,
    Growth,
    Verdict,
    cancellation,
    draws,
    energy_by_query,
    energy_profile,
    estimate,
    growth,
    last_share,
    listed,
    sentence,
    shares,
    signed_by_query,
    signed_profile,
    verdict,
    which,
)
from reproduce.nanochat.training import stage_config
from reproduce.template import fill

CORRECTED = "corrected"
"""Name of the protocol's curvature-corrected scores, where they stand beside variants."""

VARIANTS_SAID = {
    "full backpropagation": "*full backpropagation* trains without truncation",
    "normalised state": "*normalised state* normalises the state after each step, but not the prelude output that "
    "enters beside it",
    "random adapter": "*random adapter* starts with an adapter that mixes state and prelude output, where the "
    "protocol's at first passes the prelude output on and ignores the state",
    "untrained": "*untrained* has random weights throughout, the adapter's included",
}
"""What a report says of the variants that it has."""


@dataclass(frozen=True)
class Row:
    """Figures of one set of scores at one loop count.

    Attributes:
        last, last_absolute: share of the last step in signed and in absolute influence.
        last_four, last_four_absolute: of the last four.
        growth: of absolute influence; None where there is no rate.
        signed_growth: of signed influence; None too where a step's is negative.
        cancellation: :func:`.statistics.cancellation`.
    """

    last: Estimate
    last_absolute: Estimate
    last_four: float
    last_four_absolute: float
    growth: Growth | None
    signed_growth: Growth | None
    cancellation: float


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

    @property
    def corrected(self) -> dict[int, Array]:
        """The same of curvature-corrected scores; empty where none were computed."""
        return {steps: found["corrected"] for steps, found in self.scores.items() if "corrected" in found}


def outcome(run: Run[Config], corpus: Corpus, found: Mapping[str, Found]) -> Outcome:
    """Everything the report shows."""
    config = run.config
    protocol = found[config.variants[0].name]
    sets = _sets(found)
    rows = {name: {t: _row(sdi, config.seed) for t, sdi in by_steps.items()} for name, by_steps in sets.items()}
    untrained = next((f.sdi for f in found.values() if not f.variant.trained), {})
    tested = verdict(protocol.sdi, untrained, seed=config.seed)
    deep = max(protocol.sdi)
    beside = [n for n in sets if n in (protocol.variant.name, CORRECTED) or not found[n].variant.trained]
    run.figure("horizons", figures.horizons(protocol.sdi))
    run.figure("beside", figures.beside({n: sets[n] for n in beside}, config.seed))
    run.figure("checkpoints", figures.checkpoints(protocol.scores))
    losses = {n: np.array(f.loss) for n, f in found.items() if f.variant.trained}
    run.figure("variants", figures.variants({n: f.sdi for n, f in found.items()}, losses, protocol.variant.bptt_k))
    values = {
        "config": config,
        "corpus": corpus,
        "counts": corpus.counts(),
        "protocol": protocol,
        "found": found,
        "rows": rows,
        "own": rows[protocol.variant.name],
        "lasts": [row.last.value for row in rows[protocol.variant.name].values()],
        "verdict": sentence(tested),
        "faster": bool(tested.faster),
        "deep": deep,
        "spread": {t: _spread(part["by_checkpoint"]) for t, part in protocol.scores.items()},
        "several": any(len(part["checkpoints"]) > 1 for part in protocol.scores.values()),
        "others": [n for n in found if n != protocol.variant.name and deep in rows[n]],
        "common": sorted({4, deep}.intersection(*(rows[n] for n in found))),
        "beside": beside,
        "corrected": CORRECTED,
        "dampings": [d for part in protocol.scores.values() for d in part.get("dampings", [])],
        "distances": distances(run, corpus, protocol.scores, parameters(config.model)),
        "some_untrained": bool(untrained),
        "variants_said": [VARIANTS_SAID[name] for name in found if name in VARIANTS_SAID],
        "parameters": parameters(config.model),
        "body_parameters": body_parameters(config.model),
        "stages": _stages(config, corpus, protocol.history),
    }
    text = fill("nanochat", values, {"count": millions, "range": _range, "interval": _interval})
    return Outcome(
        title="Where influence sits in a looped language model",
        summary=text.summary,
        comparisons=_comparisons(config, protocol, rows[protocol.variant.name], tested),
        numbers=_numbers(corpus, found, sets, rows)
        | {"verdict": {**vars(tested), "appears": tested.appears, "sentence": sentence(tested)}},
        body=text.body,
        tells_differences=True,
    )


def _sets(found: Mapping[str, Found]) -> dict[str, dict[int, Array]]:
    """Scores by name: each variant's, and the first one's corrected ones where there are some."""
    sets = {name: f.sdi for name, f in found.items()}
    corrected = next(iter(found.values())).corrected
    return {**sets, CORRECTED: corrected} if corrected else sets


def _comparisons(config: Config, protocol: Found, own: Rows, tested: Verdict) -> tuple[Comparison, ...]:
    deep = max(own)
    four = [row.last_four for t, row in own.items() if t > 4]
    here = f"{millions(parameters(config.model))} parameters against 328.3M, {len(protocol.history)} updates"
    comparisons = [
        Comparison("share of the last step, signed, by τ", _range([row.last.value for row in own.values()]),
                   "usually ≥ 0.50", "§4, Fig. 3", here),
        Comparison(f"share of the last step at τ = {deep}, 95 % interval over queries",
                   f"{own[deep].last.low:.2f} to {own[deep].last.high:.2f}"),
        Comparison(f"shape of the absolute profile, τ = {deep}", _shape(own[deep].growth), "approximately geometric",
                   "Fig. 3",
                   "half on the last step is a growth of 2; the core shrinks changes of its state by "
                   f"{1 / protocol.loop['contraction']:.2g}"),
    ]  # fmt: skip
    if len(protocol.scores[deep]["by_checkpoint"]) > 1:
        spread = _spread(protocol.scores[deep]["by_checkpoint"])
        comparisons.append(
            Comparison(f"share of the last step at τ = {deep}, absolute: first checkpoint, last checkpoint",
                       f"{spread['first_checkpoint']:.2f}, {spread['last_checkpoint']:.2f}",
                       note="the sum weights checkpoints by learning rate and size of gradients")
        )  # fmt: skip
    if tested.steps:
        comparisons.append(
            Comparison("τ at which more than half is on the last step, and at which growth has one rate",
                       f"{which(tested.half, tested.steps)}; {which(tested.grows, tested.steps)} (of "
                       f"{listed(tested.steps)})", "all", "Fig. 3",
                       f"an untrained model's rate is exceeded at {which(tested.faster, tested.compared)}"
                       if tested.compared else "")
        )  # fmt: skip
    if four:
        comparisons.append(
            Comparison("share of the last four steps, signed, by τ > 4", _range(four), "almost all", "§4",
                       "the paper: built up \"within these last loop steps\", whatever τ")
        )  # fmt: skip
    comparisons.append(
        Comparison("held-out loss at 4 loop steps, and at most beyond", _plateau(protocol.loss), "plateau beyond τ = 4",
                   "§4", "nats per token; the paper: task accuracy on GSM8K")
    )  # fmt: skip
    return tuple(comparisons)


def _numbers(
    corpus: Corpus,
    found: Mapping[str, Found],
    sets: Mapping[str, Mapping[int, Array]],
    rows: Mapping[str, Rows],
) -> dict[str, Any]:
    """Plain values for ``results.json``."""
    return {
        "data": {"name": corpus.name, "digest": corpus.digest, "conversations": corpus.counts()},
        "profiles": {
            name: {
                str(t): {"signed": signed_profile(s).tolist(), "absolute": energy_profile(s).tolist(),
                         **asdict(rows[name][t])}
                for t, s in by_steps.items()
            }
            for name, by_steps in sets.items()
        },
        "by_checkpoint": {
            name: {
                str(t): {"checkpoints": part["checkpoints"], "absolute": part["by_checkpoint"].tolist(),
                         "dampings": part.get("dampings", [])}
                for t, part in f.scores.items()
            }
            for name, f in found.items()
        },
        "loop": {name: dict(f.loop) for name, f in found.items()},
        "loss_by_depth": {name: f.loss for name, f in found.items()},
        "history": {name: f.history for name, f in found.items()},
    }  # fmt: skip


def _stages(config: Config, corpus: Corpus, history: list[list[float]]) -> list[dict[str, Any]]:
    """Updates of each stage, and the loss over its first and its last tenth."""
    made, begin = [], 0
    for name in corpus.stages:
        updates = stage_config(config, name).updates
        losses = [row[1] for row in history[begin : begin + updates]]
        tenth = max(1, updates // 10)
        made.append({
            "name": name, "updates": updates, "checkpoints": stage_config(config, name).checkpoints,
            "first": np.mean(losses[:tenth]), "last": np.mean(losses[-tenth:]),
        })  # fmt: skip
        begin += updates
    return made


def _spread(by_checkpoint: Array) -> dict[str, float]:
    """Of absolute influence ``(K, steps)``: the largest checkpoint's share in the sum; of the last step's share, the
    median over checkpoints, and the first and the last checkpoint's."""
    each = np.asarray(by_checkpoint, dtype=np.float64)
    totals = each.sum(1)
    last = each[:, -1] / totals
    return {
        "largest": float(totals.max() / totals.sum()), "last": float(np.median(last)),
        "first_checkpoint": float(last[0]), "last_checkpoint": float(last[-1]),
    }  # fmt: skip


def _row(sdi: Array, seed: int) -> Row:
    drawn = draws(sdi.shape[1], seed=seed)
    signed, energy = signed_by_query(sdi), energy_by_query(sdi)
    signed_shares, energy_shares = shares(signed.sum(0)), shares(energy.sum(0))
    return Row(
        last=estimate(signed, last_share, drawn),
        last_absolute=estimate(energy, last_share, drawn),
        last_four=float(signed_shares[-4:].sum()),
        last_four_absolute=float(energy_shares[-4:].sum()),
        growth=growth(energy, drawn),
        signed_growth=growth(signed, drawn),
        cancellation=cancellation(sdi),
    )


def parameters(m: LoopedGPTConfig) -> int:
    """Parameters of the model: embedding, head, all blocks, adapter."""
    return 2 * m.vocab_size * m.d_model + (m.n_prelude + m.n_coda) * _block(m) + body_parameters(m)


def body_parameters(m: LoopedGPTConfig) -> int:
    """Parameters of core and adapter, which influence is measured on."""
    return m.n_core * _block(m) + 2 * m.d_model**2


def _block(m: LoopedGPTConfig) -> int:
    return (4 + 2 * m.mlp_ratio) * m.d_model**2


def _range(numbers: Sequence[float]) -> str:
    return f"{min(numbers):.3f} to {max(numbers):.3f}"


def _interval(found: Estimate | Growth | None, digits: int = 2) -> str:
    if found is None:
        return "–"
    value = found.ratio if isinstance(found, Growth) else found.value
    return f"{value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _shape(fit: Growth | None) -> str:
    if fit is None:
        return "no fit"
    single = "" if fit.r_squared >= GOOD_FIT else " (no single rate)"
    return f"growth of {_interval(fit)} per step, R² {fit.r_squared:.2f}{single}"


def _plateau(loss: list[float]) -> str:
    at = min(4, len(loss)) - 1
    return f"{loss[at]:.3f}; best {min(loss[at:]):.3f}, worst {max(loss[at:]):.3f}"
