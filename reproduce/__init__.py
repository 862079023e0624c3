"""The paper's experiments (arXiv 2602.10097, appendix D) and the claims made for it, each one command.

Each is a package of the same files: ``config`` (``CONFIGS``: scale -> frozen dataclass with a ``seed``), ``run``
(``run(run) -> Outcome``: the stages in order), ``measure`` (what the stages compute), ``analyse`` (numbers from them),
``figures`` and ``report.md.j2`` (the text); beside them what a subject needs of its own. A new one is such a package
and a line in ``EXPERIMENTS``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Where an experiment lives, and what it asks, in one line."""

    package: str
    question: str


EXPERIMENTS = {
    "fidelity": Entry(
        "reproduce.fidelity",
        "How close are sketched scores to exact ones, and what do they cost? (D.1, Fig. 4)",
    ),
    "parity": Entry(
        "reproduce.parity",
        "Does influence show the automaton inside a parity model? (D.2, Fig. 1)",
    ),
    "sudoku": Entry(
        "reproduce.sudoku",
        "When do test-time loops matter for hard puzzles? (D.3, D.4, Fig. 2, Table 1)",
    ),
    "nanochat": Entry(
        "reproduce.nanochat",
        "Where does influence sit in a looped language model? (D.5, Fig. 3)",
    ),
    "planted": Entry(
        "reproduce.planted",
        "Does influence meet known algorithm steps and planted examples? (a summary's claims)",
    ),
    "error": Entry(
        "reproduce.error",
        "Is sketching biased where a summary doubts it, and does Lemma 1 hold? (eq. 12)",
    ),
    "uses": Entry(
        "reproduce.uses",
        "Late wrong examples, probes, curriculum: does influence by step help? (a summary's uses)",
    ),
}

SCALES = {
    "minute": "a smoke test in seconds to a minute; the numbers mean nothing",
    "cpu": "smaller than the paper (the report says in what); up to 20 minutes of one core's processor time",
    "gsm8k": "nanochat in three stages on GSM8K (--data FOLDER); up to 60 minutes of one core's processor time",
    "hours": "nearer to the paper (the report says how near); up to 150 minutes of one core's processor time",
    "paper": "the paper's configuration, or what its text leaves of it; meant for a GPU, not run so far",
}
