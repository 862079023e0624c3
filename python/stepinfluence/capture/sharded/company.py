"""Processes that hold one model together, and so must run the same passes at the same time.

Under FSDP2 every pass gathers weights from all of them. So they go through their batches in rounds: who has none left
while another still has runs its last one again, for nothing. What each of them did is compared at the end of a round:
processes whose loops ran differently have taken each other's weights for their own, and nothing of that round counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from stepinfluence.errors import BodyError
from stepinfluence.shards import on_device

_END = object()


class Company:
    """The processes that gather weights with this one; by default, nobody.

    Args:
        groups: process groups, one for each dimension of the mesh; given twice, they count once.
        device: of what is exchanged.
    """

    def __init__(self, groups: Sequence[Any] = (), device: torch.device | None = None) -> None:
        self._groups = list(dict.fromkeys(groups))
        self._device = device if device is not None else torch.device("cpu")
        self._trace = hashlib.blake2b(digest_size=7)

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return all(group.size() == 1 for group in self._groups)

    @property
    def size(self) -> int:
        """How many processes there are, this one among them."""
        return math.prod(group.size() for group in self._groups)

    def most(self, *numbers: int) -> tuple[int, ...]:
        """The largest that any process gives, for each of some numbers; all processes call this, or none."""
        if self.alone:
            return numbers
        import torch.distributed as dist

        found = on_device(numbers, self._device)
        for group in self._groups:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return tuple(found.tolist())

    def reach(self, number: float) -> tuple[float, float]:
        """The largest and the smallest that the processes give; all call this."""
        if self.alone:
            return number, number
        import torch.distributed as dist

        found = torch.tensor([number, -number], dtype=torch.float64, device=self._device)
        for group in self._groups:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        highest, lowest = found.tolist()
        return highest, -lowest

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.most(int(flag))[0])

    def batches(self, loader: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """The batches of a loader, and whether each is to be kept: after the last, that one again for nothing until
        no process has any left.

        Raises:
            ValueError: the loader has no batch at all, and that of another process has.
        """
        batches, last = iter(loader), _END
        while True:
            batch = next(batches, _END)
            if not self.any(batch is not _END):
                return
            if batch is _END and last is _END:
                raise ValueError(
                    "loader: gave no batch, while that of another process did; each needs one, since the model is "
                    "spread over them"
                )
            last = last if batch is _END else batch
            yield last, batch is not _END

    def did(self, what: str) -> None:
        """Note what this process gathers."""
        self._trace.update(what.encode() + b"\n")

    def compare(self) -> None:
        """Compare what was gathered since the last time; all processes call this.

        Raises:
            BodyError: others have gathered otherwise.
        """
        mine = int.from_bytes(self._trace.digest(), "big")
        self._trace = hashlib.blake2b(digest_size=7)
        if self.most(mine, -mine) != (mine, -mine):
            raise BodyError(
                "model: its processes entered different modules in one round of batches, so that some have computed "
                "with the weights of others; give all of them batches of the same number of loop steps, or do not "
                "shard the model"
            )
