"""What separates a run from the paper's: what differs, by how much, and what it would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stepinfluence.models.gpt import LoopedGPTConfig

from reproduce.base import Result, Run
from reproduce.nanochat.config import Config
from reproduce.nanochat.corpus import Corpus
from reproduce.nanochat.training import stage_config

PARAMETERS = 328_335_360
EXAMPLES = 1024
CHECKPOINTS = 71
HORIZONS = tuple(range(2, 17))
"""The paper's (D.5)."""


@dataclass(frozen=True)
class Distance:
    """One difference: of what, here, in the paper, and what would be needed."""

    what: str
    here: str
    paper: str
    needed: str


def distances(run: Run[Config], corpus: Corpus, scores: Mapping[int, Result], parameters: int) -> list[Distance]:
    """The table of differences.

    Args:
        run: for its configuration and the processor time of its stages.
        corpus: what was trained on.
        scores: the protocol's, by loop count.
        parameters: of the model.
    """
    config, paper = run.config, LoopedGPTConfig.nanochat()
    updates = {name: stage_config(config, name).updates for name in corpus.stages}
    tokens = sum(count * config.batch * corpus.mean_tokens(name) for name, count in updates.items())
    training = _seconds(run, "training-")
    scoring = _seconds(run, "sdi-")
    examples = config.train_examples + config.query_examples
    own = sum(t * len(found["checkpoints"]) for t, found in scores.items()) * examples
    full = sum(HORIZONS) * CHECKPOINTS * 2 * EXAMPLES
    hours = scoring * full / own / 3600
    stages = " + ".join(f"{count:,} {name}" for name, count in updates.items())
    total = sum(updates.values())
    counts = [len(found["checkpoints"]) for found in scores.values()]
    fewer = f" (and {min(counts)} at most loop counts)" if min(counts) < max(counts) else ""
    rows = [
        Distance("parameters", f"{parameters:,}", f"{PARAMETERS:,}",
                 f"{PARAMETERS / parameters:.0f} times the arithmetic a token, and a GPU"),
        Distance("training", f"{millions(tokens)} tokens in {total:,} updates ({stages})",
                 "not stated; nanochat's recipe has billions of tokens in three stages",
                 f"time: here {training / total:.2f} processor seconds an update"),
        Distance("text", _texts(corpus),
                 "web text; SmolTalk, MMLU, ARC, GSM8K, identity and spelling conversations", "those data sets"),
        Distance("vocabulary", f"{config.model.vocab_size:,}", f"{paper.vocab_size:,}", "more text"),
        Distance("longest sequence, in tokens", f"{config.model.sequence_len:,}", f"{paper.sequence_len:,}", "memory"),
        Distance("checkpoints of the last stage", f"{max(counts)}{fewer}", f"{CHECKPOINTS}", "time"),
        Distance("training examples, queries", f"{config.train_examples}, {config.query_examples}",
                 f"{EXAMPLES:,}, {EXAMPLES:,}", "time"),
        Distance("loop counts", ", ".join(map(str, sorted(scores))), "2 to 16",
                 f"time: these scores took {scoring / 60:.1f} processor minutes; the paper's examples, checkpoints and "
                 f"loop counts, with this model, would take {hours:,.0f} hours"),
    ]  # fmt: skip
    if corpus.fine_tuned:
        rows.append(Distance("conversations that do not fit", "dropped, and counted", "cut off", "–"))
    return rows


def _texts(corpus: Corpus) -> str:
    parts = [corpus.name]
    if corpus.questions:
        parts.append("the training questions as text")
    if corpus.spelling and "mid-training" in corpus.stages:
        parts.append(f"{len(corpus.spelling):,} spelling tasks made here")
    return "; ".join(parts)


def _seconds(run: Run[Config], prefix: str) -> float:
    """Processor seconds of the protocol's stages of a kind."""
    key = prefix + run.config.variants[0].key
    return sum(t["cpu_seconds"] for name, t in run.timings.items() if name == key or name.startswith(f"{key}-"))


def millions(count: float) -> str:
    """``1.7M``, ``435k``."""
    if count < 1e3:
        return f"{count:.0f}"
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
