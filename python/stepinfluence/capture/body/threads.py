"""One thread at a time featurizes a model: hooks, buffers and random state are changed and put back on the way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from stepinfluence.errors import BodyError


@dataclass
class _Owner:
    thread: threading.Thread
    depth: int = 0


_guard = threading.Lock()
_owners: weakref.WeakKeyDictionary[nn.Module, _Owner] = weakref.WeakKeyDictionary()
"""Which thread is at a model, and how often it has begun: a run may have others of the same model within it."""


@contextmanager
def one_thread(model: nn.Module) -> Iterator[None]:
    """Keep other threads from featurizing a model within this context.

    Raises:
        BodyError: another thread is at it, with this capture or another one (names the thread).
    """
    here = threading.current_thread()
    with _guard:
        owner = _owners.setdefault(model, _Owner(here))
        if owner.thread is not here:
            raise BodyError(
                f"model: is being featurized by another thread ({owner.thread.name}); featurize in one thread after "
                "the other, or give each a copy of the model (copy.deepcopy) with a capture of its own"
            )
        owner.depth += 1
    try:
        yield
    finally:
        with _guard:
            owner.depth -= 1
            if not owner.depth:
                _owners.pop(model, None)
