"""What the language model is trained on, and the fixed examples whose influence is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from reproduce.nanochat.config import Config
from reproduce.nanochat.spelling import spelling_tasks, words
from reproduce.nanochat.text import (
    IGNORED,
    BPETokenizer,
    ByteTokenizer,
    Conversation,
    Document,
    Rendered,
    Tokenizer,
    document_stream,
    python_reference,
    read_records,
    render,
    trimmed,
    windows,
)

Batch = dict[str, Tensor]
Stage = Literal["pretraining", "mid-training", "fine-tuning"]
HELD_OUT = 0.1
RecordT = TypeVar("RecordT", Document, Conversation)


@dataclass(frozen=True)
class Corpus:
    """Documents and conversations, split into training and test.

    Attributes:
        name: for the report.
        digest: of everything, in order: two runs with equal digests saw the same data.
    """

    config: Config
    name: str
    digest: str
    documents: tuple[list[Document], list[Document]]
    conversations: tuple[list[Conversation], list[Conversation]]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of the configuration that there is data for; influence is measured along the last one."""
        config, made = self.config, ["pretraining"]
        if self.conversations[0]:
            made += ["mid-training"] * (config.mid_training.updates > 0)
            made += ["fine-tuning"] * (config.fine_tuning.updates > 0)
        return tuple(made)  # type: ignore[arg-type]  # mypy takes the literals for str

    @property
    def fine_tuned(self) -> bool:
        """Whether there is a stage on conversations alone; influence is then theirs."""
        return "fine-tuning" in self.stages

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self.config.tokenizer == "bytes":
            return ByteTokenizer()
        texts = [d.text for d in self.documents[0]]
        texts += [content for c in self.conversations[0] for _, content in c.turns]
        return BPETokenizer(texts, self.config.model.vocab_size)

    @cached_property
    def questions(self) -> list[Document]:
        """What the users of the training conversations say, as documents, where the configuration pretrains on it."""
        if not self.config.questions_as_text:
            return []
        return [
            Document(c.source, content) for c in self.conversations[0] for role, content in c.turns if role == "user"
        ]

    @cached_property
    def streams(self) -> tuple[Tensor, Tensor]:
        """Tokens of the training documents (and questions) and of the held-out documents.

        Raises:
            ValueError: too little text for one passage.
        """
        parts = ([*self.documents[0], *self.questions], self.documents[1])
        made = tuple(document_stream(part, self.tokenizer) for part in parts)
        for which, stream in zip(("training", "held-out"), made, strict=True):
            if len(stream) < self.config.model.sequence_len + 2:
                raise ValueError(
                    f"data: the {which} documents have {len(stream)} tokens, less than one sequence; pass more text"
                )
        return made[0], made[1]

    @cached_property
    def spelling(self) -> list[Conversation]:
        """Tasks made from the words of the training conversations."""
        if not self.config.spelling_tasks:
            return []
        known = words(content for c in self.conversations[0] for _, content in c.turns)
        return spelling_tasks(known, self.config.spelling_tasks, seed=self.config.seed)

    @cached_property
    def rendered(self) -> tuple[Rendered, Rendered]:
        """Training and test conversations as rows, without those that do not fit."""
        train, test = (render(part, self.tokenizer, self.config.model.sequence_len) for part in self.conversations)
        return train, test

    @cached_property
    def mixture(self) -> Rendered:
        """What mid-training draws from: training conversations and spelling tasks, all tokens counting."""
        mixed = [*self.conversations[0], *self.spelling]
        return render(mixed, self.tokenizer, self.config.model.sequence_len, all_tokens=True)

    @cached_property
    def tokens_digest(self) -> str:
        """Of the token ids trained on: a tokenizer that learned otherwise would go on with other training."""
        made = hashlib.blake2b(self.streams[0].numpy().tobytes(), digest_size=8)
        if self.fine_tuned:
            made.update(self.rendered[0].rows["tokens"].numpy().tobytes())
        return made.hexdigest()

    def draw(self, stage: Stage, *, size: int, rng: np.random.Generator) -> Batch:
        """A random batch to train on in a stage, no longer than its longest row."""
        if stage == "pretraining":
            return self._passages(0, size, rng)
        source = self.mixture if stage == "mid-training" else self.rendered[0]
        return trimmed(_rows(source.rows, torch.from_numpy(rng.integers(len(source), size=size))))

    def examples(self) -> tuple[Batch, Batch]:
        """The fixed training examples and queries whose influence is measured: conversations of the sources that the
        test conversations come from, the shortest first, or passages of documents."""
        rng = np.random.default_rng((self.config.seed, 3))
        sizes = (self.config.train_examples, self.config.query_examples)
        if not self.fine_tuned:
            return self._passages(0, sizes[0], rng), self._passages(1, sizes[1], rng)
        sources = {c.source for c in self.conversations[1]}
        own = [c for c in self.conversations[0] if c.source in sources]
        pools = (render(own, self.tokenizer, self.config.model.sequence_len), self.rendered[1])
        chosen = []
        for pool, size in zip(pools, sizes, strict=True):
            rows = _rows(pool.rows, torch.from_numpy(rng.permutation(len(pool))[:size]))
            chosen.append(_rows(rows, rows["tokens"].ne(IGNORED).sum(1).argsort(stable=True)))
        return chosen[0], chosen[1]

    def mean_tokens(self, stage: Stage) -> float:
        """Tokens that an example of a stage has, padding not counted."""
        if stage == "pretraining":
            return float(self.config.model.sequence_len)
        source = self.mixture if stage == "mid-training" else self.rendered[0]
        return float(source.rows["tokens"].ne(IGNORED).sum(1).float().mean())

    def counts(self) -> dict[str, dict[str, int]]:
        """By split: conversations given, used, and dropped as they do not fit into a sequence."""
        if not self.fine_tuned:
            return {}
        return {
            split: {"given": len(given), "used": len(found), "dropped": found.dropped}
            for split, given, found in zip(("train", "test"), self.conversations, self.rendered, strict=True)
        }

    def _passages(self, which: int, size: int, rng: np.random.Generator) -> Batch:
        stream, length = self.streams[which], self.config.model.sequence_len
        return windows(stream, torch.from_numpy(rng.integers(len(stream) - length, size=size)), length)


def load(config: Config) -> Corpus:
    """The user's data, or Python's language reference.

    Raises:
        ValueError: the data is damaged, or lacks what the configuration trains on.
    """
    if config.tokenizer == "bpe" and not config.data:
        raise ValueError(
            "data: this scale trains a vocabulary of its own; pass --data with a folder of train.jsonl and test.jsonl, "
            "such as GSM8K's (github.com/openai/grade-school-math, grade_school_math/data), or a file of JSON lines"
        )
    documents, conversations = read_records(config.data) if config.data else (python_reference(), [])
    name = "Python's language reference (pydoc_data.topics)"
    if documents and config.data:
        name = f"`{Path(config.data).name}`"
    elif config.data:
        documents, name = python_reference(), f"`{Path(config.data).name}`, after {name}"
    rng = np.random.default_rng(config.seed)
    train, test = _split(documents, rng)
    asked = _split(conversations, rng)
    content = repr((train, test, *asked)).encode()
    return Corpus(config, name, hashlib.blake2b(content, digest_size=8).hexdigest(), (train, test), asked)


def batches(rows: Batch, size: int, device: str) -> list[Batch]:
    """Consecutive batches of at most ``size`` rows, each no longer than its longest row."""
    starts = range(0, len(rows["tokens"]), size)
    parts = [trimmed({k: v[i : i + size] for k, v in rows.items()}) for i in starts]
    return [{k: v.to(device) for k, v in part.items()} for part in parts]


def _split(records: Sequence[RecordT], rng: np.random.Generator) -> tuple[list[RecordT], list[RecordT]]:
    """By what the records say; a tenth of them is held out if none is marked as test."""
    chosen = _held_out([r.split for r in records], rng)
    pairs = list(zip(records, chosen, strict=True))
    return [r for r, out in pairs if not out], [r for r, out in pairs if out]


def _held_out(splits: Sequence[str], rng: np.random.Generator) -> list[bool]:
    if not splits or "test" in splits:
        return [split == "test" for split in splits]
    free = [k for k, split in enumerate(splits) if not split]
    if len(splits) < 2 or not free:
        raise ValueError('data: nothing is left to test on; mark records with "split": "test", or pass more')
    out = set(rng.permutation(free)[: max(1, round(HELD_OUT * len(free)))].tolist())
    return [k in out for k in range(len(splits))]


def _rows(rows: Batch, chosen: Tensor) -> Batch:
    return {key: value[chosen] for key, value in rows.items()}
