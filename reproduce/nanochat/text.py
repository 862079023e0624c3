"""Real text to train small language models on: Python's own language reference, or the user's file.

Python ships the topics of its language reference (``pydoc_data.topics``, what ``help("for")`` prints): some 450 kB of
English that every user has. A file of the user's is JSON lines, one record a line:

    {"text": ...}                                       a document, for pretraining
    {"question": ..., "answer": ...}                    a conversation of one turn (GSM8K as it is published)
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}

each optionally with ``"source"`` (a name) and ``"split"`` (``"train"`` or ``"test"``). A folder's ``train.jsonl`` and
``test.jsonl`` are the two splits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from stepinfluence.arguments import positive_int
from torch import Tensor

Split = Literal["train", "test", ""]
IGNORED = 0
"""Token that fills rows behind their end; the mask leaves its targets out."""


@dataclass(frozen=True)
class Document:
    """A text with a name."""

    name: str
    text: str
    split: Split = ""


@dataclass(frozen=True)
class Conversation:
    """Turns in order: role (``"user"`` or ``"assistant"``) and content."""

    source: str
    turns: tuple[tuple[str, str], ...]
    split: Split = ""


class Tokenizer(Protocol):
    """Text to token ids. Ids ``0 .. 3`` are special: :data:`SPECIAL`."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        ...


SPECIAL = ("<end>", "<document>", "<user>", "<assistant>")
END, DOCUMENT, USER, ASSISTANT = range(4)
ROLES = {"user": USER, "system": USER, "assistant": ASSISTANT}


class ByteTokenizer:
    """A token for each byte of UTF-8, behind the special ones."""

    vocab_size = 256 + len(SPECIAL)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return [byte + len(SPECIAL) for byte in text.encode("utf-8")]


class BPETokenizer:
    """Byte-level byte-pair encoding, trained on ``texts`` by the ``tokenizers`` package (the ``hf`` extra).

    Args:
        texts: what to learn merges from.
        vocab_size: special tokens and the 256 bytes included.

    Raises:
        ModuleNotFoundError: ``tokenizers`` is not installed.
        ValueError: too small a vocabulary.
    """

    def __init__(self, texts: Iterable[str], vocab_size: int) -> None:
        if positive_int("vocab_size", vocab_size) < ByteTokenizer.vocab_size:
            raise ValueError(f"vocab_size: got {vocab_size}; pass at least {ByteTokenizer.vocab_size}, or use bytes")
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers, trainers

        self._backend = Backend(models.BPE())
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        self._backend.train_from_iterator(texts, trainer)
        self.vocab_size = vocab_size  # learned merges may be fewer; ids stay below it

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens: their spelling in a text is text."""
        self._backend.encode_special_tokens = True
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def python_reference() -> list[Document]:
    """The topics of Python's language reference, by name. They differ a little between versions of Python.

    Raises:
        ValueError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ValueError(
            "data: this Python was installed without its help topics (pydoc_data); pass a file of your own"
        ) from error
    return [Document(name, text) for name, text in sorted(topics.items())]


def read_records(path: Path | str) -> tuple[list[Document], list[Conversation]]:
    """Documents and conversations of a JSON-lines file, or of a folder's ``train.jsonl`` and ``test.jsonl`` (see the
    module's description).

    Raises:
        ValueError: a file cannot be read, or a line is none of the kinds of record; names the line.
    """
    path = Path(path)
    files: list[tuple[Path, Split]] = [(path, "")]
    if path.is_dir():
        files = [(path / "train.jsonl", "train"), (path / "test.jsonl", "test")]
    documents: list[Document] = []
    conversations: list[Conversation] = []
    for file, split in files:
        for made in _read(file):
            # A file of a split is of that split, whatever its records say.
            marked = replace(made, split=split) if split else made
            if isinstance(marked, Document):
                documents.append(marked)
            else:
                conversations.append(marked)
    if not documents and not conversations:
        raise ValueError(f"data: {path} holds no records; pass a file of JSON lines")
    return documents, conversations


def _read(path: Path) -> list[Document | Conversation]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would break lines within strings
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: {path} cannot be read ({error}); pass a file of JSON lines") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(_record(json.loads(line), f"{path.stem}:{number}"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'data: line {number} of {path} is no record ({error}); use {{"text": ...}}, {{"question": ..., '
                f'"answer": ...}} or {{"messages": [...]}}'
            ) from error
    return records


def _record(record: Mapping[str, Any], name: str) -> Document | Conversation:
    split = record.get("split", "")
    if split not in ("train", "test", ""):
        raise ValueError(f"split {split!r} is neither 'train' nor 'test'")
    if "text" in record:
        return Document(str(record.get("source", name)), _text(record["text"]), split)
    if "messages" in record:
        turns = tuple((str(m["role"]), _text(m["content"])) for m in record["messages"])
    else:
        turns = (("user", _text(record["question"])), ("assistant", _text(record["answer"])))
    unknown = sorted({role for role, _ in turns} - ROLES.keys())
    if unknown:
        raise ValueError(f"role {unknown[0]!r} is none of {', '.join(ROLES)}")
    if not any(role == "assistant" for role, _ in turns):
        raise ValueError("no assistant turn")
    return Conversation(str(record.get("source", "")), turns, split)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{type(value).__name__} where a text should be")
    return value


def windows(stream: Tensor, starts: Tensor, length: int) -> dict[str, Tensor]:
    """Passages of a token stream: next-token prediction at every position.

    Args:
        stream: int64 ``(tokens,)``.
        starts: int64 ``(B,)``, each at most ``tokens - length - 1``.
        length: T.

    Returns:
        ``tokens``, ``targets`` and ``mask``, ``(B, T)``.
    """
    passage = stream[starts[:, None] + torch.arange(length + 1)]
    tokens, targets = passage[:, :-1].contiguous(), passage[:, 1:].contiguous()
    return {"tokens": tokens, "targets": targets, "mask": torch.ones_like(tokens)}


def document_stream(documents: Sequence[Document], tokenizer: Tokenizer) -> Tensor:
    """All documents in one row of tokens, each behind a :data:`DOCUMENT`; int64 ``(tokens,)``."""
    ids = [i for document in documents for i in (DOCUMENT, *tokenizer.encode(document.text))]
    return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True)
class Rendered:
    """Conversations as rows of tokens.

    Attributes:
        rows: ``tokens``, ``targets`` and ``mask``, int64 ``(B, T)``; the mask is 1 where a target counts.
        dropped: how many conversations are not among the rows, as they do not fit.
    """

    rows: dict[str, Tensor]
    dropped: int

    def __len__(self) -> int:
        return len(self.rows["tokens"])


def render(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, length: int, *, all_tokens: bool = False
) -> Rendered:
    """Conversations as rows of at most ``length`` tokens. What does not fit as a whole is dropped and counted: of a
    conversation that is cut off, the answer would be missing or half.

    Args:
        conversations, tokenizer: what to write, and in which tokens.
        length: T.
        all_tokens: count all targets, as in mid-training; otherwise only what the assistant says (paper, D.5).

    Raises:
        ValueError: none fits.
    """
    rows = []
    for conversation in conversations:
        ids, own = [DOCUMENT], [0]
        for role, content in conversation.turns:
            said = [*tokenizer.encode(content), END]
            ids += [ROLES[role], *said]
            own += [int(all_tokens), *[int(all_tokens or role == "assistant")] * len(said)]
        if len(ids) <= length + 1:
            rows.append((ids, own))
    if not rows:
        raise ValueError(
            f"length: none of {len(conversations)} conversations fits into {length} tokens; use longer sequences"
        )
    tokens = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    targets, mask = tokens.clone(), torch.zeros_like(tokens)
    for k, (ids, own) in enumerate(rows):
        end = len(ids) - 1
        tokens[k, :end], targets[k, :end] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        mask[k, :end] = torch.tensor(own[1:])
    return Rendered({"tokens": tokens, "targets": targets, "mask": mask}, len(conversations) - len(rows))


def trimmed(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows without the columns behind the last target that counts in any of them, which causal attention makes
    irrelevant to the loss."""
    end = int(rows["mask"].any(0).nonzero().max()) + 1
    return {key: value[:, :end].contiguous() for key, value in rows.items()}
