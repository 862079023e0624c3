"""Problems that ``sdi evaluate`` knows: two toys, a language model, the parity model of the paper, and TRM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems import counting, language, parity, trm

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "adder": counting.adder,
    "majority": counting.majority,
    "language": language.language,
    "parity": parity.parity,
    "trm": trm.trm,
}


def make_problem(name: str, **sizes: Any) -> Problem:
    """A problem by its name.

    Args:
        name: of :data:`PROBLEMS`.
        sizes: ``n_train``, ``n_query``, ``updates``, ``seed`` and others that the problem takes.

    Raises:
        ValueError: another name, or more examples than there are.
    """
    if name not in PROBLEMS:
        raise ValueError(f"name: got {name!r}; use one of {', '.join(PROBLEMS)}")
    return PROBLEMS[name](**sizes)
