"""What public functions are given by mistake is refused in one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sdi_kernels as sk

A, G = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
ROWS, VECTORS = torch.randn(4, 5), torch.randn(2, 5)


def sketch() -> sk.TensorSketch:
    return sk.TensorSketch(6, 4, 8)


def vector() -> sk.CountSketch:
    return sk.CountSketch(6, 8)


CASES: dict[str, Callable[[], Any]] = {
    "seed: got bool": lambda: sk.CountSketch(4, 8, seed=True),
    "seed: got float": lambda: sk.CountSketch(4, 8, seed=1.5),
    "name: got int": lambda: sk.CountSketch(4, 8, name=5),
    "name: got NoneType": lambda: sk.CountSketch(4, 8, name=None),
    "role: got 'x'": lambda: sk.CountSketch(4, 8, role="x"),
    "hashing: got 'x'": lambda: sk.CountSketch(4, 8, hashing="x"),
    "index: got 99 to 99": lambda: vector().select([99]),
    "index: got -1 to -1": lambda: vector().select([-1]),
    "index: got shape .* of float64": lambda: vector().select([0.5]),
    "out: got NoneType": lambda: sk.TensorSketch.from_sides(None, vector()),
    "inp: got TensorSketch": lambda: sk.TensorSketch.from_sides(vector(), sketch()),
    "activations: got a tensor of layout": lambda: sk.sketch_linear_grads(A.to_sparse(), G, sketch()),
    "shape: got int 3": lambda: sk.variance_bound(3, 8, "iid"),
    "shape: got -3": lambda: sk.variance_bound((-3, 4), 8, "iid"),
    "shape: got 0": lambda: sk.variance_bound((0, 4), 8, "iid"),
    "m: got -1": lambda: sk.variance_bound((3, 4), -1, "iid"),
    "m: got 0": lambda: sk.variance_bound((3, 4), 0, "balanced"),
    "m: got float": lambda: sk.variance_bound((3, 4), 8.5, "iid"),
    "hashing: got 'y'": lambda: sk.variance_bound((3, 4), 8, "y"),
    "codes: got NoneType": lambda: sk.row_products(None, None, VECTORS),
    "codes: got ndarray": lambda: sk.row_products(np.zeros((4, 5), np.float32), None, VECTORS),
    "codes: got shape": lambda: sk.row_products(ROWS[0], None, VECTORS),
    "vectors: got shape": lambda: sk.row_products(ROWS, None, VECTORS[0]),
    "scales: got shape": lambda: sk.row_products(ROWS, torch.ones(4, 1), VECTORS),
    r"got \(4, 5\), no scales and \(2, 6\)": lambda: sk.row_products(ROWS, None, torch.randn(2, 6)),
    r"got \(4, 5\), 3 scales and \(2, 5\)": lambda: sk.row_products(ROWS, torch.ones(3), VECTORS),
}


@pytest.mark.parametrize("message", CASES)
def test_it_is_refused(message: str) -> None:
    """``row_products`` read beyond its vectors, and bounds of no sketch were numbers."""
    with pytest.raises((TypeError, ValueError, IndexError), match=message) as caught:
        CASES[message]()
    assert "\n" not in str(caught.value)
