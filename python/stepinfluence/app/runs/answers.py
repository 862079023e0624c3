"""The model's answers to a split's examples, beside the right ones: ``RUN/<split>.answers.json``.

They come from the project's functions ``answer`` and ``truth``, at the last checkpoint, in one forward pass of their
own after the split's features are complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepinfluence.app.project import ANSWER_CHARACTERS, MapStyle
from stepinfluence.app.runs.prepared import Prepared
from stepinfluence.capture.session import isolated
from stepinfluence.errors import StoreError
from stepinfluence.files import read_sealed, sealed, write_bytes
from stepinfluence.store import Store

FORMAT = "sdi-answers-1"
LIMIT = 1 << 30
MOST_ROWS, MOST_CHARACTERS = 100_000, 1 << 26
"""Examples whose answers are kept, the first ones of a split, and about how many characters of them."""


@dataclass(frozen=True)
class Answered:
    """What the model answers to an example, and what is right; None for what the project does not say."""

    answer: str | None = None
    truth: str | None = None

    @property
    def right(self) -> bool | None:
        """Whether the two are equal; None where one is not known."""
        return None if self.answer is None or self.truth is None else self.answer == self.truth


def answers_path(store: Path) -> Path:
    """The file of answers that belongs to a split's store."""
    return store.with_name(f"{store.name}.answers.json")


def has_answers(prepared: Prepared) -> bool:
    """Whether the project says what the model answers, or what is right."""
    return prepared.project.has("answer") or prepared.project.has("truth")


def answers_of(prepared: Prepared, examples: Sequence[Any], batch_size: int = 32) -> list[Answered]:
    """Answers to some examples at the run's last checkpoint; empty ones where the project does not say.

    Raises:
        ProjectError: a function of the project failed.
        CheckpointError: the checkpoint cannot be read.
    """
    project = prepared.project
    found: list[Answered] = []
    if project.has("answer"):
        prepared.visit(prepared.count - 1)
    for start in range(0, len(examples), batch_size):
        some = list(examples[start : start + batch_size])
        given: Sequence[str | None] | None = None
        if project.has("answer"):
            with isolated(prepared.capture.model, training=False):
                given = project.answers(prepared.capture.model, prepared.batch(some), len(some))
        given = [None] * len(some) if given is None else given
        found += [Answered(a, project.truth(example)) for a, example in zip(given, some, strict=True)]
    return found


def write_answers(prepared: Prepared, store: Store, data: MapStyle, batch_size: int) -> None:
    """Write the answers to a split's examples, unless they are there already or the project gives none.

    Raises:
        ProjectError, CheckpointError: as for :func:`answers_of`.
        StoreError: the file could not be written.
    """
    path = answers_path(store.path)
    # Processes that hold the model together answer together, or not at all.
    if not has_answers(prepared) or not prepared.capture.sharding.company.any(_read(path, store) is None):
        return
    failed = store.failed
    rows = [row for row in range(min(len(store), MOST_ROWS)) if row not in failed]
    answers: list[list[Any]] = []
    characters = 0
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        for row, one in zip(some, answers_of(prepared, [data[row] for row in some], batch_size), strict=True):
            answers.append([row, one.answer, one.truth])
            characters += len(one.answer or "") + len(one.truth or "")
        if characters > MOST_CHARACTERS:
            break
    write_bytes(path, sealed({"format": FORMAT, "manifest": store.manifest.digest, "answers": answers}))


def read_answers(store: Store) -> dict[int, Answered]:
    """Answers by row; empty where there are none of this store as it is now.

    Raises:
        StoreError: the file is damaged.
    """
    return _read(answers_path(store.path), store) or {}


def _read(path: Path, store: Store) -> dict[int, Answered] | None:
    if not path.is_file():
        return None
    content = read_sealed(path, LIMIT)
    if content.get("format") != FORMAT or content.get("manifest") != store.manifest.digest:
        return None
    try:
        found = {row: Answered(answer, truth) for row, answer, truth in content["answers"]}
        fine = all(
            type(row) is int and 0 <= row < len(store) and _is_text(one.answer) and _is_text(one.truth)
            for row, one in found.items()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: damaged ({error}); remove it, and featurize again") from error
    if not fine:
        raise StoreError(f"{path}: damaged: no answers to rows of {store.path}; remove it, and featurize again")
    return found


def _is_text(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= ANSWER_CHARACTERS)
