"""What only extras install: a library that is missing is named with the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def install_command(extra: str) -> str:
    """What to type. Where the package is installed, pip keeps it as it is and adds what the extra needs."""
    return f"pip install 'sdi-kernels[{extra}]'"


@contextmanager
def needed(extra: str) -> Iterator[None]:
    """Around imports of what an extra installs.

    Raises:
        ModuleNotFoundError: one of them is not installed; the message says how to.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: run {install_command(extra)}", name=error.name
        ) from error
