"""Programs of ``bench.attack.programs`` that die on purpose; imported by the processes that tests start."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.attack.processes import Disturbance
from bench.attack.programs import featurizing, training

PROGRAMS: dict[str, Callable[[Path], Callable[[], None]]] = {
    "capture": partial(featurizing, workers=0),
    "capture by workers": partial(featurizing, workers=2),
    "training": training,
}


def run(program: str, at: Path, event: int = 0, limit: int = 0) -> None:
    """Run a program, which is killed in place of its n-th dealing with files, or may make no larger files."""
    torch.set_num_threads(1)
    if event:
        Disturbance(signal.SIGKILL, event=event).arm(at)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the traceback is wanted
    PROGRAMS[program](at)()


def failing(at: Path, call: int) -> None:
    """Featurize into a store with a loss that raises at its n-th call.

    Raises:
        RuntimeError: it has.
    """
    torch.set_num_threads(1)
    left = [call]

    def fail() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("the loss has no more")

    featurizing(at, 0, fail)()
