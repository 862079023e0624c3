"""How ``fft`` gathers a token's row in shared memory: a side's inverse table, laid out for it. Imports no Triton.

A *slot* is one source of one bucket, or none; a *line* has a slot of each bucket of a chunk, so that a warp reads it in
order. A slot is one int32: the source's place in the row below, its sign as bf16 (+1, -1, 0: none) above. A pass
brings ``row`` features to shared memory and takes ``chunks * slots`` lines from them; longer rows and fuller buckets
take several passes, and before each but the first lie :data:`HEAD` numbers, of which the first is the row's first
feature.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdi_kernels.triton.transforms import FftConfig

MAX_ROW = 1 << 14
"""Features that are brought to shared memory at a time, in registers on the way."""

MAX_SLOTS = 1 << 14
"""Of a pass, in registers as well."""

WIDE_SLOTS = 1 << 13
"""Slots of a pass beyond which a gather leaves no registers for anything else."""

WHOLE_BYTES = 64 << 10
"""Of rows on a device that has shared memory for the matrices of two residues as well."""

HEAD = 4
"""Numbers between passes: as many as one load of 128 bits has."""

KEPT_REGISTERS = {1024: 128, 2048: 80}
"""For slots that stay in registers over a program's tokens, by buckets of a chunk."""

AHEAD_REGISTERS = 64
"""Of them that allow the next token to be loaded while one is transformed, and :data:`AHEAD_BYTES` of both sides."""

AHEAD_BYTES = 16 << 10


class Layout(NamedTuple):
    """What a kernel is compiled for, of one side.

    Attributes:
        row: features of a pass, a power of two (or, in order, those of all chunks); 0: gathered from memory.
        slots: of a bucket and pass, a power of two; 0: feature i lies in bucket i.
        chunks: of m / residues buckets each, those that hold sources.
        passes: over a token's features.
    """

    row: int
    slots: int
    chunks: int
    passes: int

    @property
    def lines(self) -> int:
        """Of slots, a pass."""
        return max(1, self.slots) * self.chunks


@functools.lru_cache(maxsize=256)
def constants_of(layouts: tuple[Layout, Layout], size: int, config: FftConfig) -> Mapping[str, Any]:
    """What the kernel is compiled for: ``layouts`` of the sides "in" and "out", of ``size`` bytes a feature at most."""
    chunk = config.rows * config.n2
    by_row = config.tokens == 1
    is_wide = any(x.passes > 1 or x.lines * chunk > WIDE_SLOTS for x in layouts)
    left = KEPT_REGISTERS[chunk] if by_row and not is_wide else 0
    needed = [(2 if x.slots else 1) * x.lines * chunk // (32 * config.num_warps) for x in layouts]
    kept = [False, False]
    for k in sorted((0, 1), key=lambda k: -needed[k]):
        kept[k] = needed[k] <= left
        left -= needed[k] if kept[k] else 0
    short = all(kept) and sum(needed) <= AHEAD_REGISTERS and sum(x.row for x in layouts) * size <= AHEAD_BYTES
    constants: dict[str, Any] = {
        "IS_WHOLE": by_row and is_wide and config.residues == 2 and config.row_bytes >= WHOLE_BYTES,
        "PREFETCH": config.prefetch and short,
        "IS_SHORT": by_row and not is_wide and config.residues <= 2 and layouts[0].row == chunk // 2
        and layouts[0].slots == 0,
    }  # fmt: skip
    for x, is_kept, name in zip(layouts, kept, ("IN", "OUT"), strict=True):
        constants |= {
            f"ROW_{name}": x.row, f"SLOTS_{name}": x.slots, f"CHUNKS_{name}": x.chunks, f"IS_KEPT_{name}": is_kept,
            f"IS_LONG_{name}": x.passes > 1,
        }  # fmt: skip
    return constants


def _cycles(layout: Layout, size: int, chunk: int) -> float:
    """About what a token's gather takes of shared memory."""
    return layout.passes * (2 * layout.row * size / 128 + 3 * layout.lines * chunk / 32)


def layout_of(bucket: npt.NDArray[np.int64], d: int, size: int, config: FftConfig) -> Layout:
    """The cheapest layout of a side: ``bucket`` of each of ``d`` features of ``size`` bytes."""
    chunk = config.rows * config.n2
    if d <= config.residues * chunk and np.array_equal(bucket, np.arange(d)):
        chunks = 1 << (-(-d // chunk) - 1).bit_length()
        return Layout(chunk // 2 if d <= chunk // 2 else chunks * chunk, 0, chunks, 1)
    found = []
    row = min(max(128, 1 << (d - 1).bit_length()), MAX_ROW, config.row_bytes // size)
    while row >= 128:
        passes, fullest = -(-d // row), 1
        for first in range(0, d, row):
            fullest = max(fullest, int(np.bincount(bucket[first : first + row]).max()))
        slots = 1
        while slots * config.residues * chunk <= MAX_SLOTS and slots < 2 * fullest:
            found.append(Layout(row, slots, config.residues, passes * -(-fullest // slots)))
            slots *= 2
        row //= 2
    return min(found, key=lambda layout: _cycles(layout, size, chunk))


def lay_out(
    bucket: npt.NDArray[np.int64], sign: npt.NDArray[np.int64], layout: Layout, config: FftConfig
) -> npt.NDArray[np.int32]:
    """The numbers that a kernel reads of a side, ``bucket`` and ``sign`` (d,)."""
    chunk = config.rows * config.n2
    features = np.arange(len(bucket))
    bits = np.where(sign < 0, np.int64(0xBF80 << 16) - (1 << 32), 0x3F80 << 16)
    if layout.slots == 0:
        lines = np.zeros(layout.chunks * chunk, dtype=np.int32)
        lines[features] = bits
        return lines
    part = features // layout.row
    group = part * config.residues * chunk + bucket
    order = np.argsort(group, kind="stable")
    begins = np.r_[True, np.diff(group[order]) != 0]
    rank = np.empty_like(order)
    rank[order] = features - np.maximum.accumulate(np.where(begins, features, 0))
    passes_a_row = layout.passes // -(-len(bucket) // layout.row)
    size = layout.chunks * layout.slots * chunk
    found = np.zeros((layout.passes, size + HEAD), dtype=np.int32)
    found[:, 0] = np.arange(layout.passes) // passes_a_row * layout.row
    line = bucket // chunk * layout.slots + rank % layout.slots
    found[part * passes_a_row + rank // layout.slots, HEAD + line * chunk + bucket % chunk] = (
        bits | features % layout.row
    )
    return found.ravel()[HEAD:]


class Side(NamedTuple):
    """One side as a launch takes it: the numbers on the device, and their layout."""

    table: Tensor
    layout: Layout


_known: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int, Side]] = {}
"""Sides by where their inverse tables lie, with the tables and the versions of their contents."""


def side(table: Tensor, d: int, size: int, config: FftConfig) -> Side:
    """Of an inverse table (m, c): made and copied to the device once, while the table lives as it is."""
    if config.tokens > 1:
        return Side(table, Layout(0, 0, 1, table.shape[1]))
    if table.is_inference():
        return _made(table, d, size, config)
    key = table.data_ptr(), *table.shape, table.device, d, size, config
    reference, version, found = _known.get(key, (lambda: None, 0, None))
    seen = reference()
    if found is None or seen is None or not version == seen._version == table._version:
        if key not in _known:
            weakref.finalize(table, _known.pop, key, None)
        found = _made(table, d, size, config)
        _known[key] = weakref.ref(table), table._version, found
    return found


def _made(table: Tensor, d: int, size: int, config: FftConfig) -> Side:
    host = table.cpu().numpy()
    at, _ = np.nonzero(host)
    signed = host[np.nonzero(host)].astype(np.int64)
    bucket, sign = np.empty(d, dtype=np.int64), np.empty(d, dtype=np.int64)
    bucket[np.abs(signed) - 1], sign[np.abs(signed) - 1] = at, np.sign(signed)
    layout = layout_of(bucket, d, size, config)
    return Side(torch.from_numpy(lay_out(bucket, sign, layout, config)).to(table.device), layout)
