"""Where a launch reads the uses of a linear layer: one pair of tensors, or a table of many.

A *slot* is a run of rows of ``out`` at one step, with the pairs whose sketches are added there: one, or several where
the uses of a step add up. Pairs of a slot cover all its rows; where rows of pairs overlap in part, they are cut. Grids
run over slots x rows of the largest slot; programs beyond a slot's rows return at once. A program of ``direct`` and
``shear`` adds up all pairs of its row before its epilogue, their tokens one after another; the last launch of ``fft``
adds up what its programs made of single pairs.

The table is one int64 tensor: ``SLOT`` numbers for each slot (where its pairs begin in the table, how many there are,
rows, offset in ``out``), then ``PAIR`` numbers for each pair of each slot (both addresses, tokens, tokens of the slot
before it, strides of row and token). Tensors are read where they lie; only one whose features are not dense is copied.
A call sends its table by one copy from pinned memory, which waits for nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sdi_kernels.calls import LinearCall, LinearStepsCall

SLOT, PAIR = tl.constexpr(4), tl.constexpr(8)

PAIR_NUMBERS: int = PAIR.value

ALIGNMENT = 16
"""Bytes of the widest load."""

_captured: list[Tensor] = []
"""Tables on the host that CUDA graphs copy from at every replay: kept for as long as the process lives."""


@triton.jit
def slot(p_table, i_slot):
    """First pair of a slot, pairs, rows, offset in ``out``."""
    p_slot = p_table + i_slot * SLOT
    p_pair = p_table + tl.load(p_slot)
    return p_pair, tl.load(p_slot + 1).to(tl.int32), tl.load(p_slot + 2).to(tl.int32), tl.load(p_slot + 3)


@triton.jit
def pair(p_pair, p_a, p_g, i_row, IS_ALIGNED: tl.constexpr):
    """A pair's row: both pointers (of the types of ``p_a`` and ``p_g``), strides of their tokens, tokens, and those of
    the slot's that come before them."""
    p_a = tl.load(p_pair).to(p_a.dtype)
    p_g = tl.load(p_pair + 1).to(p_g.dtype)
    tokens, before = tl.load(p_pair + 2).to(tl.int32), tl.load(p_pair + 3).to(tl.int32)
    stride_ar, stride_at = tl.load(p_pair + 4), tl.load(p_pair + 5)
    stride_gr, stride_gt = tl.load(p_pair + 6), tl.load(p_pair + 7)
    if IS_ALIGNED:  # what the launcher says of an argument, said of a loaded number
        p_a = tl.multiple_of(p_a, 16)
        p_g = tl.multiple_of(p_g, 16)
        stride_ar = tl.multiple_of(stride_ar, 128 // p_a.dtype.element_ty.primitive_bitwidth)
        stride_at = tl.multiple_of(stride_at, 128 // p_a.dtype.element_ty.primitive_bitwidth)
        stride_gr = tl.multiple_of(stride_gr, 128 // p_g.dtype.element_ty.primitive_bitwidth)
        stride_gt = tl.multiple_of(stride_gt, 128 // p_g.dtype.element_ty.primitive_bitwidth)
    p_a += i_row * stride_ar
    p_g += i_row * stride_gr
    return p_a, p_g, stride_at, stride_gt, tokens, before


class Work(NamedTuple):
    """What a launch works off.

    Attributes:
        out: the first of its rows; ``activations``, ``grad_outputs``: the pair, or the first of many.
        table: see above; ``out`` stands in for it where there is one pair.
        slots: how many; ``rows``, ``pairs``, ``tokens``: the most that one has.
        longest: tokens of the longest pair.
        strides: of activations and gradients: (row, token, feature) each; with a table only the last ones count.
        constants: for the kernel.
        held: what has to live until the launch.
    """

    out: Tensor
    activations: Tensor
    grad_outputs: Tensor
    table: Tensor
    slots: int
    rows: int
    pairs: int
    tokens: int
    longest: int
    strides: tuple[int, ...]
    constants: dict[str, Any]
    held: tuple[Tensor, ...] = ()


def work(call: LinearCall | LinearStepsCall) -> Work | None:
    """The work of a call; None where there is nothing to add."""
    if isinstance(call, LinearStepsCall):
        return _many(call.out, _dense(call.activations), _dense(call.grad_outputs), call.steps, call.rows)
    out, activations, grad_outputs = call[:3]
    count, tokens, _ = activations.shape
    if count == 0 or tokens == 0:
        return None
    constants = {"IS_LIST": False, "IS_ALIGNED": False}
    strides = (*activations.stride(), *grad_outputs.stride())
    return Work(out, activations, grad_outputs, out, 1, count, 1, tokens, tokens, strides, constants)


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """With dense features: those that are not are copied."""
    if all(stride == 1 for _, _, stride in map(Tensor.stride, tensors)):
        return list(tensors)
    return [x if x.stride()[2] == 1 or x.shape[2] == 1 else x.contiguous() for x in tensors]


def _slots(activations: Sequence[Tensor], steps: Sequence[int], rows: Sequence[int]) -> list[tuple[int, int, int, Any]]:
    """(step, first row, last row, pairs) of each slot; pairs without tokens are in none."""
    shapes = [a.shape for a in activations]
    if len(set(steps)) == len(shapes) and all(count and tokens for count, tokens, _ in shapes):
        return [
            (step, row, row + shape[0], [k])
            for k, (shape, step, row) in enumerate(zip(shapes, steps, rows, strict=True))
        ]
    by_step: dict[int, list[tuple[int, int, int]]] = {}
    for k, (shape, step, row) in enumerate(zip(shapes, steps, rows, strict=True)):
        count, tokens, _ = shape
        if count and tokens:
            by_step.setdefault(step, []).append((row, row + count, k))
    found = []
    for step, runs in by_step.items():
        if len(runs) == 1:
            begin, end, k = runs[0]
            found.append((step, begin, end, [k]))
            continue
        cuts = sorted({cut for run in runs for cut in run[:2]})
        for first, last in itertools.pairwise(cuts):
            if inside := [k for begin, end, k in runs if begin <= first and last <= end]:
                found.append((step, first, last, inside))
    return found


def _many(
    out: Tensor,
    activations: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    steps: Sequence[int],
    rows: Sequence[int],
) -> Work | None:
    slots = _slots(activations, steps, rows)
    if not slots:
        return None
    size_a, size_g = activations[0].element_size(), grad_outputs[0].element_size()
    stride_or, stride_os, _ = out.stride()
    # A call may have hundreds of pairs: nothing is done for each of them that can be done once.
    numbers: list[int] = []
    pairs: list[int] = []
    most, longest, ends, at = 0, 0, 0, SLOT.value * len(slots)
    strides: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    stride_ar = stride_at = stride_gr = stride_gt = 0
    addresses_a, addresses_g = list(map(Tensor.data_ptr, activations)), list(map(Tensor.data_ptr, grad_outputs))
    strides_a, strides_g = list(map(Tensor.stride, activations)), list(map(Tensor.stride, grad_outputs))
    lengths = [a.shape[1] for a in activations]
    for step, first, last, inside in slots:
        numbers += (at, len(inside), last - first, first * stride_or + step * stride_os)
        before = 0
        for k in inside:
            p_a, p_g, length = addresses_a[k], addresses_g[k], lengths[k]
            if (strides_a[k], strides_g[k]) != strides:
                strides = strides_a[k], strides_g[k]
                (stride_ar, stride_at, _), (stride_gr, stride_gt, _) = strides
                ends |= (stride_ar | stride_at) * size_a | (stride_gr | stride_gt) * size_g
            if skipped := first - rows[k]:
                p_a += skipped * stride_ar * size_a
                p_g += skipped * stride_gr * size_g
            pairs += (p_a, p_g, length, before, stride_ar, stride_at, stride_gr, stride_gt)
            ends |= p_a | p_g
            before += length
            if length > longest:
                longest = length
            at += PAIR_NUMBERS
        if before > most:
            most = before
    return Work(
        out[:, 0],
        activations[0],
        grad_outputs[0],
        _sent(numbers + pairs, out.device),
        len(slots),
        max([last - first for _, first, last, _ in slots]),
        max([len(inside) for *_, inside in slots]),
        most,
        longest,
        (0, 0, 1, 0, 0, 1),
        {"IS_LIST": True, "IS_ALIGNED": ends % ALIGNMENT == 0},
        (*activations, *grad_outputs),
    )


def _sent(numbers: list[int], device: torch.device) -> Tensor:
    if device.type != "cuda":  # interpreted
        return torch.from_numpy(np.array(numbers, dtype=np.int64))
    host = torch.from_numpy(np.array(numbers, dtype=np.int64)).pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)
