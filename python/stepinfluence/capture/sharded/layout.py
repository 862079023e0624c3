"""How a model is spread over processes: by FSDP2, by tensor parallelism, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.capture.body.batches import fingerprints
from stepinfluence.capture.sharded.company import Company
from stepinfluence.capture.sharded.gathered import Gathered
from stepinfluence.capture.sharded.parallel import Parallel
from stepinfluence.errors import BodyError
from stepinfluence.shards import is_sharded


class Sharding:
    """What of a model lies in other processes; nothing of most models.

    Args:
        model: unwrapped. If it is sharded, all its processes must make this.

    Attributes:
        gathered: what FSDP2 has sharded.
        parallel: its tensor-parallel layers.
        company: the processes that must run the same passes at the same time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gathered = Gathered(model)
        self.parallel = Parallel(model, but=self.gathered.wholes)
        device = self.gathered.device or next((p.device for p in model.parameters()), torch.device("cpu"))
        self.company = self.gathered.company = Company([*self.gathered.groups, *self.parallel.groups], device)

    @property
    def any(self) -> bool:
        """Whether anything is sharded."""
        return self.gathered.any or self.parallel.any

    def used(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """What modules compute with for a parameter of the model; None where it is sharded in a way that is not
        known."""
        whole = self.gathered.whole(parameter)
        return whole if not is_sharded(whole) or self.parallel.has(whole) else None

    def refuse(self, what: str) -> None:
        """Refuse a model that is sharded.

        Args:
            what: for which it cannot be, in words.

        Raises:
            BodyError: it is.
        """
        if self.any:
            raise BodyError(
                f"model: is sharded over processes, which {what} cannot handle; give this process the whole model "
                "(features of the two can be compared: names and digests are the same)"
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the passes of a run."""
        with self.gathered.running(), self.parallel.running():
            yield

    def same_batch(self, batch: Any, size: int, batch_dim: int) -> None:
        """See :meth:`.Parallel.same_batch`; for a batch of ``size`` examples."""
        if self.parallel.any and not self.company.alone:
            self.parallel.same_batch(fingerprints(batch, size, batch_dim), self.company)

    def add_up(self, features: Tensor, blocks: Sequence[Any]) -> None:
        """See :meth:`.Parallel.add_up`."""
        self.parallel.add_up(features, blocks, self.company)
