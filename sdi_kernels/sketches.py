"""Sketch objects: the tables of one parameter tensor, ready for kernels.

``CountSketch`` compresses vectors, ``TensorSketch`` matrices that are sums of outer products (paper, Definitions
3 and 4, Lemma 3). Both are immutable; :meth:`tables` gives the device tensors that the kernels take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdi_kernels import _checks, borders
from sdi_kernels.hashing import (
    BLOCK_BUCKETS,
    HASH_FAMILIES,
    MAX_SHEAR_SIZE,
    MAX_SKETCH_SIZE,
    HashFamily,
    Role,
    draw_buckets,
    draw_signs,
    inverse_table,
)

TableLike = Sequence[int] | Tensor | npt.NDArray[Any]


def _host_array(name: str, values: TableLike) -> npt.NDArray[np.int64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16: let the check below refuse it like other floats, not the conversion.
        values = values.float() if values.is_floating_point() else values
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: got shape {array.shape} of {array.dtype}; pass a 1-D array of integers")
    return array.astype(np.int64)


class CountSketch:
    """CountSketch of length-``d`` vectors into ``m`` buckets: ``CS(x)[p] = sum_{i: h(i)=p} s(i) x[i]``.

    Args:
        d: length of the vectors.
        m: number of buckets (the sketch size).
        seed: any integer; tables are a pure function of (seed, name, role, d, m, hashing).
        name: name of the parameter the sketch is for, so that parameters get independent tables.
        hashing: ``"balanced"`` (default, lossless where ``d <= m``), ``"iid"`` (the paper's) or ``"block"`` (opt-in,
            for a GPU kernel that has not been timed: docs/kernels.md).
        role: which side of an outer product it serves; leave it at ``"vector"`` for a vector parameter.

    Attributes:
        bucket: int32 host array ``(d,)``, values in ``[0, m)``.
        sign: int8 host array ``(d,)``, values in ``{-1, +1}``.
        contiguous: ``bucket[i] == i`` for all i: kernels may read the source as it lies in memory.
        family: the hash family it was drawn from; None if made from given tables.
        blocks: number of blocks of 16 consecutive buckets with a coordinate in them.

    Raises:
        ValueError, TypeError: ``d`` or ``m`` is no positive integer, or ``hashing`` is not a family.
    """

    def __init__(
        self,
        d: int,
        m: int,
        *,
        seed: int = 0,
        name: str = "",
        hashing: HashFamily = "balanced",
        role: Role = "vector",
    ) -> None:
        d = _checks.positive_int("d", d, maximum=2**31 - 2)
        m = _checks.positive_int("sketch_size", m, maximum=MAX_SKETCH_SIZE)
        seed = _checks.integer("seed", seed)
        _checks.instance("name", name, str)
        _checks.one_of("hashing", hashing, HASH_FAMILIES)
        _checks.one_of("role", role, get_args(Role))
        self._set(
            draw_buckets(d, m, seed=seed, name=name, role=role, hashing=hashing),
            draw_signs(d, seed=seed, name=name, role=role),
            m,
            hashing,
        )

    def _set(
        self, bucket: npt.NDArray[np.int32], sign: npt.NDArray[np.int8], m: int, family: HashFamily | None = None
    ) -> None:
        self.family = family
        self.blocks = len(np.unique(bucket // BLOCK_BUCKETS))
        self.bucket = bucket
        self.sign = sign
        self.m = m
        self.d = len(bucket)
        self.contiguous = self.d <= m and bool(np.array_equal(bucket, np.arange(self.d)))
        # Tensors from the start, since torch.compile could not trace the numpy code at first use; and never
        # inference tensors, which a later training step could not save for its backward pass.
        gather = inverse_table(bucket, sign, m)
        with torch.inference_mode(False):
            self._host_tables = [torch.from_numpy(table.copy()) for table in (bucket, sign, gather)]
        borders.trust(self._host_tables, self.contiguous)
        self._device_tables: dict[torch.device, list[Tensor]] = {}

    @classmethod
    def from_tables(cls, bucket: TableLike, sign: TableLike, m: int) -> CountSketch:
        """A sketch with given tables (for example the published package's), shape ``(d,)`` each."""
        m = _checks.positive_int("sketch_size", m, maximum=MAX_SKETCH_SIZE)
        h, s = _host_array("bucket", bucket), _host_array("sign", sign)
        if len(h) != len(s) or len(h) == 0:
            raise ValueError(f"bucket, sign: got lengths {len(h)} and {len(s)}; pass equal, non-zero lengths")
        if h.min() < 0 or h.max() >= m:
            raise ValueError(f"bucket: got values in [{h.min()}, {h.max()}]; they must lie in [0, {m})")
        if not np.isin(s, (-1, 1)).all():
            raise ValueError("sign: got values other than -1 and +1")
        self = cls.__new__(cls)
        self._set(h.astype(np.int32), s.astype(np.int8), m)
        return self

    def select(self, index: slice | Sequence[int] | npt.NDArray[np.int64]) -> CountSketch:
        """The sketch restricted to some coordinates: for a slice ``x[index]`` of a vector sketched by ``self``."""
        if not isinstance(index, slice):
            index = _host_array("index", index)
            if len(index) and not (index.min() >= 0 and index.max() < self.d):
                raise IndexError(
                    f"index: got {index.min()} to {index.max()}; the sketch has coordinates 0 to {self.d - 1}"
                )
        return CountSketch.from_tables(self.bucket[index], self.sign[index], self.m)

    def tables(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """``[bucket int32 (d,), sign int8 (d,), gather int32 (m, c)]`` on ``device`` (cached there).

        ``gather`` is the inverse table of :func:`sdi_kernels.hashing.inverse_table`.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return self._host_tables
        if device not in self._device_tables:
            with torch.inference_mode(False):
                tables = [table.to(device) for table in self._host_tables]
            if any(type(table) is not Tensor for table in tables):
                return tables  # made under a fake or tracing mode: of no use to a later, real call
            borders.trust(tables, self.contiguous)
            self._device_tables[device] = tables
        return self._device_tables[device]

    @property
    def fingerprint(self) -> str:
        """Hex digest of (m, tables): equal exactly when two sketches are comparable."""
        digest = hashlib.blake2b(str(self.m).encode(), digest_size=16)
        digest.update(self.bucket.astype("<i4").tobytes())
        digest.update(self.sign.tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"CountSketch(d={self.d}, m={self.m})"


class TensorSketch:
    """TensorSketch of ``(d_out, d_in)`` matrices into ``m`` buckets (paper, Definition 4 and Lemma 3).

    ``TS(G)[p] = sum_{i,j: (h_out(i) + h_in(j)) mod m = p} s_out(i) s_in(j) G[i,j]``; for an outer product it is
    the circular convolution of two CountSketches.

    Args:
        d_out, d_in: shape of the matrices (for a linear layer: of its weight).
        m, seed, name, hashing: as for :class:`CountSketch`.

    Attributes:
        out, inp: the CountSketches of the two sides.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        m: int,
        *,
        seed: int = 0,
        name: str = "",
        hashing: HashFamily = "balanced",
    ) -> None:
        d_out = _checks.positive_int("d_out", d_out)
        d_in = _checks.positive_int("d_in", d_in)
        self.out = CountSketch(d_out, m, seed=seed, name=name, hashing=hashing, role="out")
        self.inp = CountSketch(d_in, m, seed=seed, name=name, hashing=hashing, role="in")

    @classmethod
    def from_sides(cls, out: CountSketch, inp: CountSketch) -> TensorSketch:
        """A TensorSketch from two CountSketches of equal size ``m``."""
        _checks.instance("out", out, CountSketch)
        _checks.instance("inp", inp, CountSketch)
        if out.m != inp.m:
            raise ValueError(f"out, inp: got sketch sizes {out.m} and {inp.m}; they must be equal")
        self = cls.__new__(cls)
        self.out, self.inp = out, inp
        return self

    @classmethod
    def from_tables(cls, h_out: TableLike, s_out: TableLike, h_in: TableLike, s_in: TableLike, m: int) -> TensorSketch:
        """A TensorSketch with given tables: ``(d_out,)`` twice, ``(d_in,)`` twice."""
        return cls.from_sides(CountSketch.from_tables(h_out, s_out, m), CountSketch.from_tables(h_in, s_in, m))

    @property
    def m(self) -> int:
        return self.out.m

    @property
    def d_out(self) -> int:
        return self.out.d

    @property
    def d_in(self) -> int:
        return self.inp.d

    @property
    def shearable(self) -> bool:
        """Whether the ``shear`` route can take this sketch: blocks of 16 buckets, inputs read as they lie in memory."""
        return self.inp.contiguous and self.m % BLOCK_BUCKETS == 0 and self.m <= MAX_SHEAR_SIZE

    @property
    def T(self) -> TensorSketch:
        """The sketch that gives the same numbers for the transposed matrix: ``TS.T(G.T) == TS(G)``."""
        return TensorSketch.from_sides(self.inp, self.out)

    def tables(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The six device tensors of the kernels: those of ``out``, then those of ``inp``."""
        return [*self.out.tables(device), *self.inp.tables(device)]

    @property
    def fingerprint(self) -> str:
        """Hex digest of both sides."""
        return hashlib.blake2b((self.out.fingerprint + self.inp.fingerprint).encode(), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return f"TensorSketch(d_out={self.d_out}, d_in={self.d_in}, m={self.m})"
