"""One side's examples as the page shows them: ids, texts, tokens, losses, answers."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepinfluence.app.runs.answers import Answered
from stepinfluence.display.words import visible
from stepinfluence.store import Store, StoredRow

TEXT_IN_LISTS = 300
"""Characters of an example's text shown in lists; the whole text comes with the example itself."""

TEXT_LIMIT = 1_000_000
"""Characters of one example's text that are sent at all."""

TOKENS_SHOWN = 4096
"""Tokens of one example that are sent."""

MOST_ROWS = 1000
"""Entries that a list may have in one answer."""

MOST_FOUND = 10_000
"""Examples that a search finds; further ones are not counted."""

FINDS_KEPT = 8


class Side:
    """The examples of a store. Safe to use from several threads."""

    def __init__(self, name: str, store: Store, answers: Mapping[int, Answered] | None = None) -> None:
        self.name, self.store = name, store
        self.failed = store.failed
        self._answers = answers or {}
        self._found: OrderedDict[str, list[int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.store)

    @functools.cached_property
    def losses(self) -> list[Any]:
        """Losses of all rows, by checkpoint."""
        return [self.store.losses(k) for k in range(len(self.store.checkpoints))]

    @functools.cached_property
    def _lengths(self) -> NDArray[np.int64] | None:
        known = [found for k in range(len(self.store.checkpoints)) if (found := self.store.lengths(k)) is not None]
        return np.stack(known).max(0) if known else None

    def taken(self, row: int) -> slice:
        """Places of the steps that an example took at any checkpoint, which are what there is to show of a trajectory:
        at least one, of zero where its loss depends on none. All where features are summed over steps."""
        return slice(None) if self._lengths is None else slice(0, max(1, int(self._lengths[row])))

    def require(self, row: int) -> None:
        """Raise ValueError unless there is such a row."""
        if not 0 <= row < len(self):
            raise ValueError(f"{self.name}: got row {row}; there are rows 0 to {len(self) - 1}")

    def short(self, row: int) -> dict[str, Any]:
        """Number, id and what the text begins with."""
        return short(self.store.row(row))

    def listed(self, *, find: str = "", offset: int = 0, limit: int = 100) -> dict[str, Any]:
        """Examples in order, optionally those whose id or text contains ``find`` (case does not matter).

        Raises:
            ValueError: there are no such places in a list.
        """
        if offset < 0 or not 1 <= limit <= MOST_ROWS:
            raise ValueError(f"limit: got offset {offset} and limit {limit}; use 0 or more, and 1 to {MOST_ROWS}")
        rows = self._matching(find) if find else range(len(self))
        items = [self.entry(row) for row in rows[offset : offset + limit]]
        return {"total": len(rows), "more": bool(find) and len(rows) >= MOST_FOUND, "items": items}

    def entry(self, row: int) -> dict[str, Any]:
        """One example as a list shows it."""
        said = self._answers.get(row)
        right = None if said is None else said.right
        return {
            **self.short(row),
            "loss": number(self.losses[-1][row]),
            "failed": row in self.failed,
            "right": right,
        }

    def _matching(self, find: str) -> list[int]:
        with self._lock:
            if find not in self._found:
                self._found[find] = self.store.matching(find, MOST_FOUND)
                while len(self._found) > FINDS_KEPT:
                    self._found.popitem(last=False)
            return self._found[find]

    def whole(self, row: int) -> dict[str, Any]:
        """Everything about one example.

        Raises:
            ValueError: no such row.
        """
        self.require(row)
        stored = self.store.row(row)
        text, tokens, said = stored.text or "", stored.tokens or (), self._answers.get(row, Answered())
        return {
            **short(stored),
            "text": _lines(text[:TEXT_LIMIT]),
            "cut": max(0, len(text) - TEXT_LIMIT),
            "tokens": [visible(token) for token in tokens[:TOKENS_SHOWN]],
            "moreTokens": max(0, len(tokens) - TOKENS_SHOWN),
            "metadata": {visible(str(k)): visible(str(v)) for k, v in stored.metadata.items()},
            "losses": [number(losses[row]) for losses in self.losses],
            "failed": visible(self.failed.get(row, "")),
            "answer": None if said.answer is None else _lines(said.answer),
            "truth": None if said.truth is None else _lines(said.truth),
            "right": said.right,
        }


def short(stored: StoredRow) -> dict[str, Any]:
    """Number, id and what the text begins with."""
    text = stored.text or ""
    cut = "…" if len(text) > TEXT_IN_LISTS else ""
    return {"row": stored.row, "id": visible(str(stored.id)[:200]), "text": visible(text[:TEXT_IN_LISTS]) + cut}


def number(value: Any) -> float | None:
    """A number that JSON can hold."""
    return float(value) if np.isfinite(value) else None


def _lines(text: str) -> str:
    """Control characters spelled out, line by line: the page keeps line breaks of a whole text."""
    return "\n".join(visible(line) for line in text.splitlines())
