"""Which part of the work is this process's: from the environment that torchrun or SLURM's srun sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stepinfluence.errors import ConfigError
from stepinfluence.machine import usable_device

LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    # Not SLURM_NTASKS: that is also set in a batch script itself, which runs once.
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Worker:
    """One process of ``world_size``. Workers never talk: shard ``s`` is worker ``s % world_size``'s, and a store's
    shards are files of their own.

    Attributes:
        rank: this process, from 0.
        world_size: how many there are.
        local_rank: this process among those on this machine: the number of its GPU.
        launcher: who said so.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Worker:
        """From ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``, else from srun's variables; else the only worker.

        Raises:
            ConfigError: they are no numbers, or do not fit together.
        """
        for launcher, *names in LAUNCHERS:
            if names[0] not in environment or names[1] not in environment:
                continue
            try:
                rank, size, local = (int(environment.get(name, "0")) for name in names)
            except ValueError:
                given = ", ".join(f"{name}={environment.get(name)!r}" for name in names)
                raise ConfigError(f"environment: {given}; whole numbers are expected") from None
            if not 0 <= rank < size or local < 0:
                raise ConfigError(
                    f"environment: {names[0]}={rank}, {names[1]}={size}, {names[2]}={local} do not fit together; "
                    "unset them, or start through torchrun or srun"
                )
            return cls(rank, size, local, launcher if size > 1 else "")
        return cls()

    def device(self, asked: str) -> torch.device:
        """The device that ``asked`` means here: with several workers on a machine, ``"cuda"`` is one GPU for each.

        Raises:
            ConfigError: no such device.
        """
        if asked == "auto":
            asked = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = usable_device(asked)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())
