"""Where a file that may hold anything comes in: one error for whatever is wrong with it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from stepinfluence.errors import CheckpointError, StepInfluenceError


@contextmanager
def border(what: str) -> Iterator[None]:
    """Turn whatever is raised within into a :class:`CheckpointError` of one line that begins with ``what``."""
    try:
        yield
    except StepInfluenceError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({why(error)})") from error


def why(error: Exception) -> str:
    """What is wrong with a file, for its reader. Whoever reads it stumbles over broken ones anywhere: where an error is
    about its own insides (an index, a key, a number of bytes), the file is damaged or something else."""
    if isinstance(
        error, LookupError | AssertionError | TypeError | AttributeError | EOFError | struct.error | UnicodeError
    ):
        return "damaged, cut short, or something else"
    return reason(error)


def reason(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none (an empty file's EOFError)."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
