"""Sketch objects: pure functions of their arguments, tables, fingerprints."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sketch_cases import SKETCH, families, integers

import sdi_kernels as sk
from sdi_kernels import CountSketch, HashFamily, TensorSketch
from sdi_kernels.hashing import inverse_table


@families
def test_sketch_is_a_pure_function_of_its_arguments(hashing: HashFamily) -> None:
    base: dict[str, Any] = {"d": 30, "m": 40, "seed": 1, "name": "w", "hashing": hashing, "role": "vector"}
    changes: list[dict[str, Any]] = [{}, {"d": 31}, {"m": 41}, {"seed": 2}, {"name": "v"}, {"role": "out"}]
    prints = [CountSketch(**{**base, **change}).fingerprint for change in changes]
    assert len(set(prints)) == len(prints)
    assert CountSketch(**base).fingerprint == prints[0]
    assert CountSketch(**{**base, "seed": np.int64(1)}).fingerprint == prints[0]


def test_sides_of_a_tensor_sketch_are_independent_streams() -> None:
    sketch = TensorSketch(40, 40, 8, hashing="iid", name="w")
    assert not np.array_equal(sketch.out.bucket, sketch.inp.bucket)
    assert not np.array_equal(sketch.out.sign, sketch.inp.sign)
    assert sketch.out.fingerprint == CountSketch(40, 8, hashing="iid", name="w", role="out").fingerprint
    assert sketch.inp.fingerprint == CountSketch(40, 8, hashing="iid", name="w", role="in").fingerprint


def test_fingerprint_covers_every_table() -> None:
    bucket, sign = [0, 1, 2], [1, -1, 1]
    base = CountSketch.from_tables(bucket, sign, 4)
    others = [
        CountSketch.from_tables(bucket, sign, 5),
        CountSketch.from_tables([0, 1, 3], sign, 4),
        CountSketch.from_tables(bucket, [1, -1, -1], 4),
        CountSketch.from_tables([0, 1], [1, -1], 4),
    ]
    assert len({s.fingerprint for s in [base, *others]}) == 5
    pairs = [(base, base), (base, others[1]), (others[1], base)]
    assert len({TensorSketch.from_sides(o, i).fingerprint for o, i in pairs}) == 3


@families
def test_from_tables_takes_arrays_tensors_and_lists(hashing: HashFamily) -> None:
    sketch = TensorSketch(9, 5, 6, hashing=hashing)
    tables = (sketch.out.bucket, sketch.out.sign, sketch.inp.bucket, sketch.inp.sign)
    for convert in (np.asarray, torch.from_numpy, np.ndarray.tolist):
        again = TensorSketch.from_tables(*(convert(t) for t in tables), 6)
        assert again.fingerprint == sketch.fingerprint
        assert again.inp.contiguous == sketch.inp.contiguous


def test_select_sketches_a_slice_of_a_vector() -> None:
    """The part of a fused parameter: CS(x) = CS_a(x[a]) + CS_b(x[b])."""
    sketch, x = CountSketch(10, 6), integers(2, 1, 10)
    rest = np.array([0, 1, 2, 3, 9])
    parts = (sketch.select(slice(4, 9)), x[..., 4:9]), (sketch.select(rest), x[..., rest])
    total = sum(sk.sketch_vector_grads(values, part) for part, values in parts)
    assert torch.equal(total, sk.sketch_vector_grads(x, sketch))


def test_tables() -> None:
    sketch = CountSketch(9, 4, hashing="iid")
    bucket, sign, gather = sketch.tables()
    assert (bucket.dtype, sign.dtype, gather.dtype) == (torch.int32, torch.int8, torch.int32)
    assert bucket.tolist() == sketch.bucket.tolist()
    assert sign.tolist() == sketch.sign.tolist()
    assert gather.tolist() == inverse_table(sketch.bucket, sketch.sign, 4).tolist()
    for device in ("cpu", "meta"):
        tables = sketch.tables(device)
        assert {t.device.type for t in tables} == {device}
        assert sketch.tables(torch.device(device))[0] is tables[0], "tables are copied to a device once"
    both = TensorSketch(9, 5, 4)
    assert [t.tolist() for t in both.tables()] == [t.tolist() for t in [*both.out.tables(), *both.inp.tables()]]


def test_transposing_twice() -> None:
    assert SKETCH.T.T.fingerprint == SKETCH.fingerprint
    assert (SKETCH.T.d_out, SKETCH.T.d_in, SKETCH.T.m) == (4, 5, 7)


def test_repr() -> None:
    assert repr(SKETCH) == "TensorSketch(d_out=5, d_in=4, m=7)"
    assert repr(SKETCH.out) == "CountSketch(d=5, m=7)"
