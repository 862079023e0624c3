"""Features: sketched (or exact) per-example gradients, per loop step or summed, with what makes them comparable."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.shards import add_portions, portion

DIGEST_ENTRIES = 1 << 17
"""Entries of a tensor that are widened to 64 bits at a time for a digest: as many as stay in a CPU's cache. Other
devices take 256 times as many, to be asked less often."""


DIGEST_ROW = 64
"""Entries of up to 32 bits whose weighted sums are exact in float64: 2**31 * (2 * 64)**2 * 64 = 2**51."""


@functools.cache
def _digest_powers() -> Tensor:
    """``p**e`` of the places in a row: ``(DIGEST_ROW, 3)``."""
    with torch.inference_mode(False):
        within = torch.arange(1, 2 * DIGEST_ROW, 2, dtype=torch.float64, device="cpu")
        return torch.stack([torch.ones_like(within), within, within * within], 1)


def _weighted_sums(data: Tensor, start: int) -> Tensor:
    """``sum_k data[k] * p_k**e`` mod 2**64 for ``e`` = 0, 1, 2, with ``p_k = 2 * (start + k) + 1``: int64 ``(3,)``."""
    whole = len(data) - len(data) % DIGEST_ROW if data.device.type == "cpu" and data.element_size() <= 4 else 0
    sums: Tensor | None = None
    if whole:
        # Rows by a product of matrices, which is exact; then their places are moved to where the rows are.
        s0, s1, s2 = (data[:whole].view(-1, DIGEST_ROW).double() @ _digest_powers()).long().unbind(1)
        offset = torch.arange(2 * start, 2 * (start + whole), 2 * DIGEST_ROW)
        moved = s0 * offset
        sums = torch.stack([s0.sum(), (s1 + moved).sum(), (s2 + (2 * s1 + moved) * offset).sum()])
    if whole < len(data):
        rest = data[whole:].long()
        place = torch.arange(2 * (start + whole) + 1, 2 * (start + len(data)), 2, device=data.device)
        weighted = rest * place
        last = torch.stack([rest.sum(), weighted.sum(), (weighted * place).sum()])
        sums = last if sums is None else sums + last
    return torch.zeros(3, dtype=torch.int64, device=data.device) if sums is None else sums


def weights_digest(parameters: Sequence[Tensor]) -> str:
    """Digest of tensors' exact bits: the same on every device (integer arithmetic modulo 2**64 only), and however they
    are spread over processes, which must all call this."""
    spread: list[int] = []
    sums: list[Tensor] = []
    for parameter in parameters:
        data, start, shared = portion(parameter)
        if shared:
            spread.append(len(sums))
        if data.layout != torch.strided:
            data = data.to_dense()
        data = torch.view_as_real(data.resolve_conj()) if data.is_complex() else data
        # The two numbers of a complex one count each for itself.
        start *= 2 if parameter.is_complex() else 1
        data = data.reshape(-1)
        data = data.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()])
        size = DIGEST_ENTRIES if data.device.type == "cpu" else DIGEST_ENTRIES << 8
        parts = [_weighted_sums(data[k : k + size], start + k) for k in range(0, len(data), size)]
        empty = torch.zeros(3, dtype=torch.int64, device=data.device)
        sums.append(parts[0] if len(parts) == 1 else sum(parts, empty))
    if spread:
        together = torch.stack([sums[place] for place in spread])
        add_portions([parameters[place] for place in spread], together)
        for place, mixed in zip(spread, together, strict=True):
            sums[place] = mixed
    by_device: dict[torch.device, list[Tensor]] = {}
    for mixed in sums:
        by_device.setdefault(mixed.device, []).append(mixed)
    # A device is waited for once, not for each tensor.
    numbers = {device: iter(torch.stack(some).tolist()) for device, some in by_device.items()}
    digest = hashlib.blake2b(digest_size=16)
    for parameter, mixed in zip(parameters, sums, strict=True):
        digest.update(repr((tuple(parameter.shape), next(numbers[mixed.device]))).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Features:
    """Features of N examples at one checkpoint.

    Attributes:
        values: ``(N, steps, D)`` with ``values[n, t]`` the features of ``phi_{t+1}`` (paper, eq. 2), or ``(N, D)``
            summed over steps. Steps that an example's batch did not run are zero.
        losses: ``(N,)``.
        steps: ``(N,)`` int64, loop steps that were executed for the example.
        lengths: ``(N,)`` int64, the last step (1-based) through which the loss depends on the body: less than ``steps``
            where an example is read out or halted earlier; 0 if it depends on none. None for summed features.
        ids: one hashable per example.
        space: what the columns mean.
        step_labels: name of each step (the body module that was entered), of the batch with the most steps.
        content: where no ids were given, a number per example made from what its batch held: features of several
            checkpoints are of the same examples only if these are equal. Empty otherwise.
        stored_as: dtype of the store that the values were read from, which has rounded them; empty from a capture.
    """

    values: Tensor
    losses: Tensor
    steps: Tensor
    lengths: Tensor | None
    ids: tuple[Hashable, ...]
    space: FeatureSpace
    step_labels: tuple[str, ...] = ()
    content: tuple[int, ...] = ()
    stored_as: str = ""

    def require_whole(self, name: str) -> None:
        """Raise unless the parts fit together: features are made by captures and stores, but anyone can make some.

        Raises:
            TypeError, ValueError: they do not (says which), beginning with ``name``.
        """
        shape = tuple(self.values.shape)
        if not self.values.is_floating_point():
            raise TypeError(f"{name}: values of {self.values.dtype}; pass floating numbers")
        if len(shape) not in (2, 3) or shape[-1] != self.space.width:
            raise ValueError(
                f"{name}: values of shape {shape}; their space has {self.space.width} columns: (N, [steps,] D)"
            )
        found = {"losses": len(self.losses), "steps": len(self.steps), "ids": len(self.ids)}
        found |= {} if self.lengths is None else {"lengths": len(self.lengths)}
        found |= {"content": len(self.content)} if self.content else {}
        other = next((part for part, count in found.items() if count != shape[0]), None)
        if other is not None:
            raise ValueError(f"{name}: {found[other]} {other} for {shape[0]} examples; give one each")

    @property
    def per_step(self) -> bool:
        return self.values.dim() == 3

    def __len__(self) -> int:
        return len(self.values)

    def summed(self) -> Features:
        """The same features summed over steps (paper, eq. 2): ``(N, D)``."""
        if not self.per_step:
            return self
        return replace(self, values=self.values.sum(1), lengths=None)

    def select(self, places: Sequence[int]) -> Features:
        """Some of the examples, in the order given."""
        chosen = torch.tensor(places, dtype=torch.int64)
        return replace(
            self,
            values=self.values[chosen.to(self.values.device)],
            losses=self.losses[chosen],
            steps=self.steps[chosen],
            lengths=self.lengths[chosen] if self.lengths is not None else None,
            ids=tuple(self.ids[k] for k in places),
            content=tuple(self.content[k] for k in places) if self.content else (),
        )

    def to(self, device: torch.device | str) -> Features:
        """The same features on another device."""
        return replace(self, values=self.values.to(device))

    def __repr__(self) -> str:
        kind = f"{self.space.kind}, {'per step' if self.per_step else 'summed over steps'}"
        return f"Features({tuple(self.values.shape)}, {kind}, {len(self.space.blocks)} parameters)"


class FeatureBuilder:
    """Grows the arrays of :class:`Features` batch by batch, without a second copy of the values at the end."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, *, per_step: bool, expected: int) -> None:
        self._width, self._dtype, self._device = width, dtype, device
        self._per_step = per_step
        self._values = self._allocate(expected, 0)
        self._count = self._reserved = 0
        self._losses: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._ids: list[Hashable] = []
        self.fingerprints: list[int] = []
        self._labels: tuple[str, ...] = ()

    def _allocate(self, rows: int, steps: int, need: int = 0) -> Tensor:
        """Zeros for ``rows``; for ``need`` where a loader tells a length that no memory holds (streams without end)."""
        try:
            return self._zeros(rows, steps)
        except (MemoryError, RuntimeError, ValueError):
            if rows <= need:
                raise
            return self._zeros(need, steps)

    def _zeros(self, rows: int, steps: int) -> Tensor:
        shape = (rows, steps, self._width) if self._per_step else (rows, self._width)
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # numpy's zeros come from calloc: pages are zeroed by the operating system when first written, so that nothing
        # is filled twice and rows that stay unused cost no memory. torch.zeros would write them all.
        return torch.from_numpy(np.zeros(shape, dtype=np.float64 if self._dtype == torch.float64 else np.float32))

    def reserve(self, rows: int, steps: int) -> Tensor:
        """A zero buffer ``(rows, steps, D)`` or ``(rows, D)`` for the next batch; it becomes part of the result
        by :meth:`commit`."""
        need = self._count + rows
        have = self._values
        wide = max(steps, have.shape[1]) if self._per_step else 0
        if need > len(have) or (self._per_step and wide > have.shape[1]):
            larger = self._allocate(max(need, len(have) if self._count == 0 else int(1.5 * need)), wide, need)
            if self._per_step:
                larger[: self._count, : have.shape[1]] = have[: self._count]
            else:
                larger[: self._count] = have[: self._count]
            self._values = larger
        self._reserved = need
        rows_ = self._values[self._count : need]
        return rows_[:, :steps] if self._per_step else rows_

    def discard(self) -> None:
        """Forget the reserved rows, of a batch that failed half-way."""
        self._values[self._count : self._reserved].zero_()

    def commit(self, ids: Sequence[Hashable], losses: Tensor, labels: Sequence[str], lengths: Tensor | None) -> None:
        """Keep the reserved rows; ``labels`` names the steps that this batch ran."""
        steps = len(labels)
        if steps > len(self._labels):
            self._labels = tuple(labels)
        self._count += len(losses)
        self._ids.extend(ids)
        self._losses.append(losses)
        self._steps.append(torch.full((len(losses),), steps, dtype=torch.int64))
        if lengths is not None:
            self._lengths.append(lengths)

    @property
    def count(self) -> int:
        return self._count

    def finish(self, space: FeatureSpace) -> Features:
        """The features of everything committed."""
        values = self._values[: self._count]
        if len(self._values) > 1.2 * self._count:
            values = values.clone()  # let a badly overestimated reservation go
        return Features(
            values=values,
            losses=torch.cat(self._losses) if self._losses else torch.zeros(0),
            steps=torch.cat(self._steps) if self._steps else torch.zeros(0, dtype=torch.int64),
            lengths=torch.cat(self._lengths)
            if self._lengths
            else (torch.zeros(0, dtype=torch.int64) if self._per_step else None),
            ids=tuple(self._ids),
            space=space,
            step_labels=self._labels,
            content=tuple(self.fingerprints),
        )
