"""What the language model is trained on, and the fixed examples whose influence is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from reproduce.nanochat.config import Config
from reproduce.nanochat.text import (
    BPETokenizer,
    ByteTokenizer,
    Conversation,
    Document,
    Tokenizer,
    document_stream,
    python_reference,
    read_records,
    render,
    windows,
)

Batch = dict[str, Tensor]
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
    def fine_tuned(self) -> bool:
        """Whether there is a stage on conversations; influence is then theirs."""
        return bool(self.conversations[0]) and self.config.fine_tuning.updates > 0

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self.config.tokenizer == "bytes":
            return ByteTokenizer()
        texts = [d.text for d in self.documents[0]]
        texts += [content for c in self.conversations[0] for _, content in c.turns]
        return BPETokenizer(texts, self.config.model.vocab_size)

    @cached_property
    def streams(self) -> tuple[Tensor, Tensor]:
        """Tokens of the training and of the held-out documents.

        Raises:
            ValueError: too little text for one passage.
        """
        made = tuple(document_stream(part, self.tokenizer) for part in self.documents)
        for which, stream in zip(("training", "held-out"), made, strict=True):
            if len(stream) < self.config.model.sequence_len + 2:
                raise ValueError(
                    f"data: the {which} documents have {len(stream)} tokens, less than one sequence; pass more text"
                )
        return made[0], made[1]

    @cached_property
    def rendered(self) -> tuple[Batch, Batch]:
        """All training and test conversations as rows."""
        train, test = (render(part, self.tokenizer, self.config.model.sequence_len) for part in self.conversations)
        return train, test

    def draw(self, *, fine_tuning: bool, size: int, generator: torch.Generator) -> Batch:
        """A random batch to train on."""
        if fine_tuning:
            return _rows(self.rendered[0], torch.randint(len(self.rendered[0]["tokens"]), (size,), generator=generator))
        return self._passages(0, size, generator)

    def examples(self) -> tuple[Batch, Batch]:
        """The fixed training examples and queries whose influence is measured: conversations of the sources that the
        test conversations come from, or passages of documents."""
        generator = torch.Generator().manual_seed(self.config.seed + 2**33)
        sizes = (self.config.train_examples, self.config.query_examples)
        if not self.fine_tuned:
            return self._passages(0, sizes[0], generator), self._passages(1, sizes[1], generator)
        sources = {c.source for c in self.conversations[1]}
        length = self.config.model.sequence_len
        own = render([c for c in self.conversations[0] if c.source in sources], self.tokenizer, length)
        chosen = []
        for rows, size in zip((own, self.rendered[1]), sizes, strict=True):
            order = torch.randperm(len(rows["tokens"]), generator=generator)[:size]
            chosen.append(_rows(rows, order.sort().values))
        return chosen[0], chosen[1]

    def _passages(self, which: int, size: int, generator: torch.Generator) -> Batch:
        stream, length = self.streams[which], self.config.model.sequence_len
        return windows(stream, torch.randint(len(stream) - length, (size,), generator=generator), length)


def load(config: Config) -> Corpus:
    """The user's file, or Python's language reference.

    Raises:
        ValueError: the file is damaged, or lacks what the configuration trains on.
    """
    documents, conversations = read_records(config.data) if config.data else (python_reference(), [])
    if config.tokenizer == "bpe" and not config.data:
        raise ValueError("data: this scale trains a vocabulary of its own; pass a file of documents and conversations")
    name = "the user's file" if config.data else "Python's language reference (pydoc_data.topics)"
    if not documents:
        documents, name = python_reference(), f"{name}, after Python's language reference"
    rng = np.random.default_rng(config.seed)
    train, test = _split(documents, rng)
    asked = _split(conversations, rng)
    content = repr((train, test, *asked)).encode()
    return Corpus(config, name, hashlib.blake2b(content, digest_size=8).hexdigest(), (train, test), asked)


def batches(rows: Batch, size: int, device: str) -> list[Batch]:
    """Consecutive batches of at most ``size`` rows."""
    count = len(rows["tokens"])
    return [{k: v[i : i + size].to(device) for k, v in rows.items()} for i in range(0, count, size)]


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
