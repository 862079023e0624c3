"""The slots that ``fft`` gathers by are a side's CountSketch, whatever their layout; they are made once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from sdi_kernels import CountSketch
from sdi_kernels.triton import slots, transforms
from sdi_kernels.triton.slots import HEAD, Layout

CONFIGS = {m: transforms.config_of(m, True, 227 << 10) for m in transforms.SKETCH}


def gathered(x: np.ndarray, made: slots.Side, m: int) -> np.ndarray:
    """What the kernel makes of one token's side, from the layout's description."""
    table, layout = made.table.numpy(), made.layout
    chunk = m // CONFIGS[m].residues
    out = np.zeros((layout.chunks, chunk))
    size = layout.lines * chunk
    first = 0
    for k in range(layout.passes):
        begin = k * (size + HEAD)
        if k:
            first = int(table[begin - HEAD])
        numbers = table[begin : begin + size]
        sign = (numbers & ~0xFFFF).view(np.float32)
        if layout.slots == 0:
            values = np.pad(x, (0, size - len(x)))
        else:
            row = np.pad(x, (0, layout.row))[first : first + layout.row]
            values = row[numbers & 0xFFFF]
        out += (sign * values).reshape(layout.chunks, max(1, layout.slots), chunk).sum(1)
    return np.concatenate([out.ravel(), np.zeros(m - out.size)])


@pytest.mark.parametrize("m", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("hashing", ["balanced", "iid", "block"])
@pytest.mark.parametrize("role", ["in", "out"])
@pytest.mark.parametrize("d", [1, 1500, 20000])
def test_slots_are_the_count_sketch(m: int, hashing: Any, role: Any, d: int) -> None:
    sketch = CountSketch(d, m, hashing=hashing, role=role)
    x = np.random.default_rng(d).integers(-8, 9, d).astype(np.float64)
    want = np.zeros(m)
    np.add.at(want, sketch.bucket, sketch.sign * x)
    for size in (2, 4):
        made = slots.side(sketch.tables()[2], d, size, CONFIGS[m])
        assert np.array_equal(gathered(x, made, m), want)
        assert (made.layout.slots == 0) == (sketch.contiguous and d <= m)


def test_layouts() -> None:
    def layout(d: int, m: int, role: Any = "out") -> Layout:
        sketch = CountSketch(d, m, role=role)
        return slots.layout_of(sketch.bucket.astype(np.int64), d, 2, CONFIGS[m])

    assert layout(768, 2048) == Layout(row=1024, slots=1, chunks=1, passes=1)
    assert layout(768, 2048, "in") == Layout(row=1024, slots=0, chunks=1, passes=1)
    assert layout(1500, 2048, "in") == Layout(row=2048, slots=0, chunks=1, passes=1)
    assert layout(3000, 4096, "in") == Layout(row=4096, slots=0, chunks=2, passes=1)
    assert layout(11008, 2048, "in") == Layout(row=16384, slots=8, chunks=1, passes=1)
    assert layout(768, 8192) == Layout(row=1024, slots=1, chunks=4, passes=1)
    long = layout(50000, 1024)
    assert long.passes > 1
    assert long.row <= slots.MAX_ROW
    assert long.lines * 1024 <= slots.MAX_SLOTS


def test_rows_leave_shared_memory_to_the_matrices() -> None:
    bucket = CountSketch(11008, 2048).bucket.astype(np.int64)
    for shared, longest in ((227 << 10, 64 << 10), (163 << 10, 32 << 10), (99 << 10, 32 << 10), (64 << 10, 16 << 10)):
        config = transforms.config_of(2048, True, shared)
        assert config.row_bytes == longest
        assert slots.layout_of(bucket, 11008, 4, config).row * 4 <= longest
    wide = Layout(8192, 4, 2, 2)
    assert not slots.constants_of((wide, wide), 4, transforms.config_of(4096, True, 99 << 10))["IS_WHOLE"]


def test_what_stays_in_registers() -> None:
    def constants(m: int, size: int, side_in: Layout, side_out: Layout, has_low: bool = False) -> Mapping[str, Any]:
        return slots.constants_of((side_in, side_out), size, transforms.config_of(m, has_low, 227 << 10))

    one, order = Layout(1024, 1, 1, 1), Layout(1024, 0, 1, 1)
    found = constants(2048, 2, order, one)
    assert all(found[name] for name in ("PREFETCH", "IS_SHORT", "IS_KEPT_IN", "IS_KEPT_OUT"))
    assert not constants(2048, 4, order, one, has_low=True)["PREFETCH"]
    two = Layout(4096, 2, 1, 1)
    found = constants(2048, 2, two, two)
    assert (found["IS_KEPT_IN"], found["IS_KEPT_OUT"], found["PREFETCH"]) == (True, False, False)
    wide = constants(4096, 2, Layout(16384, 4, 2, 1), Layout(4096, 1, 2, 1))
    assert wide["IS_WHOLE"]
    assert not any(wide[name] for name in ("IS_KEPT_IN", "IS_KEPT_OUT", "PREFETCH"))
    several = transforms.config_of(256, False, 227 << 10)
    assert slots.constants_of((Layout(0, 0, 1, 1),) * 2, 2, several)["IS_WHOLE"] is False


def test_made_once_while_the_table_stays_as_it_is() -> None:
    table = CountSketch(100, 1024).tables()[2].clone()
    config = CONFIGS[1024]
    made = slots.side(table, 100, 4, config)
    assert slots.side(table, 100, 4, config) is made
    assert slots.side(table, 100, 2, config) is not made
    table.neg_()
    again = slots.side(table, 100, 4, config)
    assert torch.equal(again.table & 0xFFFF, made.table & 0xFFFF)
    assert not torch.equal(again.table, made.table)
    known = len(slots._known)
    del table
    assert len(slots._known) == known - 2
    with torch.inference_mode():
        table = CountSketch(100, 1024).tables()[2].clone()
    assert torch.equal(slots.side(table, 100, 4, config).table, made.table)
