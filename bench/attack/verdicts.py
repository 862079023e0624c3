"""What came of one input, and how an exception is judged."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar("T")

REFUSED, SAME, FOUND, OTHER = "refused", "same", "found", "told apart"
LOST, SILENT, UNCAUGHT, UNJUST, HANG, CRASHED = "lost", "silent", "uncaught", "unjust", "hang", "crashed"

GOOD = {
    REFUSED: "refused in one line",
    SAME: "same answer or same bytes",
    FOUND: "read, and named by what checks the bytes",
    OTHER: "read as another valid file, and told apart from the first by its digest or its content",
}
BAD = {
    LOST: "bytes lost or changed",
    SILENT: "an answer changed silently, or a wrong input was taken",
    UNCAUGHT: "a traceback, an error of no documented type, or one of several lines",
    UNJUST: "refused, though nothing was wrong with it",
    HANG: "no end within 10 s",
    CRASHED: "the process died",
}


class Verdict(NamedTuple):
    """Of one input.

    Attributes:
        kind: of :data:`GOOD` or :data:`BAD`.
        detail: what was attacked, and what came of it.
        kills: processes that were killed on the way.
    """

    kind: str
    detail: str = ""
    kills: int = 0

    @property
    def bad(self) -> bool:
        return self.kind in BAD


def judged(
    use: Callable[[], T], errors: tuple[type[BaseException], ...], where: str
) -> tuple[T | None, Verdict | None]:
    """What ``use`` gives, or the verdict on its exception: refused if it is one of ``errors`` in one line."""
    try:
        return use(), None
    except errors as error:
        if "\n" in str(error) or not str(error):
            return None, Verdict(UNCAUGHT, f"{where}: {type(error).__name__} of several lines or none: {error}")
        return None, Verdict(REFUSED, f"{where}: {error}")
    except Exception as error:  # of whatever kind: that is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        return None, Verdict(UNCAUGHT, f"{where}: {type(error).__name__} at {place}: {error}")
