"""Spelling tasks for mid-training, in the manner of nanochat's SimpleSpelling and SpellingBee (Karpathy, 2025)."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from reproduce.nanochat.text import Conversation

WORD = re.compile(r"\b[a-z]{3,12}\b")
SOURCES = ("spelling", "letters")
"""Names of the two kinds of task: spell a word; count a letter in it."""


def words(texts: Iterable[str]) -> list[str]:
    """Lower-case words of 3 to 12 letters, each once, in alphabetical order."""
    return sorted({word for text in texts for word in WORD.findall(text)})


def spelling_tasks(known: list[str], count: int, *, seed: int) -> list[Conversation]:
    """Conversations of the two kinds in turn, all of them for training.

    Args:
        known: words to draw from.
        count: of tasks.
        seed: of words and letters.

    Raises:
        ValueError: no words.
    """
    if not known:
        raise ValueError("data: the training texts have no words of 3 to 12 lower-case letters to spell; pass more")
    rng = np.random.default_rng((seed, 4))
    made = []
    for k in range(count):
        word = known[int(rng.integers(len(known)))]
        if k % 2 == 0:
            made.append(_task("spelling", f"Spell the word: {word}", _spelled(word)))
            continue
        # Mostly a letter of the word, sometimes any: the answer can be 0.
        letters = word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz"
        letter = letters[int(rng.integers(len(letters)))]
        made.append(_task("letters", f"How many {letter} are in the word {word}?", _counted(word, letter)))
    return made


def _task(source: str, question: str, answer: str) -> Conversation:
    return Conversation(source, (("user", question), ("assistant", answer)), "train")


def _spelled(word: str) -> str:
    return f"{word}:{','.join(word)}"


def _counted(word: str, letter: str) -> str:
    """The word letter by letter, with a running count, then the answer as GSM8K has it."""
    count, lines = 0, []
    for number, one in enumerate(word, 1):
        count += one == letter
        lines.append(f"{number}:{one}" + (f" hit! count={count}" if one == letter else ""))
    return "\n".join([_spelled(word), *lines, f"#### {count}"])
