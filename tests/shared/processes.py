"""Several processes that hold a model together: one process group (gloo) for all checks of a test."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _joined(rank: int, size: int, rendezvous: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()


def together(work: Callable[..., None], size: int, folder: Path, *args: Any) -> None:
    """Run ``work(rank, *args)`` in ``size`` processes of one group, and raise what one of them raises.

    Args:
        work: a function of a module.
        folder: for the file at which they meet.
    """
    multiprocessing.set_forkserver_preload(["torch", "stepinfluence", work.__module__])
    meeting = folder / f"rendezvous-{len(list(folder.glob('rendezvous-*')))}"
    mp.start_processes(_joined, (size, str(meeting), work, args), nprocs=size, start_method="forkserver")
