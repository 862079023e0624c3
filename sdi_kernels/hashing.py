"""Hash tables of the sketches: families, keyed seeds and the table format.

A CountSketch needs, per coordinate ``i`` of a length-``d`` vector, a bucket ``h(i)`` in ``[0, m)`` and a sign
``s(i)`` in ``{-1, +1}``. Sketches made by different processes, on different devices and in different versions
are only comparable if those tables agree bit for bit, so the way they are drawn is a *format*
(:data:`HASH_FORMAT`), pinned by golden values in the tests:

* every table has its own stream, keyed by ``blake2b(json([format, seed, name, role]))``; seeds are never added
  up, so streams of different parameters cannot collide;
* the stream is the raw 64-bit output of the counter-based Philox-4x64-10 generator (its raw words are fixed by
  the algorithm; only integer arithmetic follows, so no library's sampling code is part of the format);
* tables are made on the host and copied to the device, never drawn there.

Families (``Var`` = variance of the TensorSketch inner-product estimate, docs/design.md):

``iid``
    Buckets drawn independently, as in the paper (arXiv 2602.10097, Definitions 3 and 4):
    ``Var <= (6/m + 4/m^2) |X|^2 |Y|^2``.
``balanced`` (default)
    Every bucket receives ``floor(d/m)`` or ``ceil(d/m)`` coordinates (an injection where ``d <= m``). Unbiased
    because the signs are independent; for ``d_out, d_in <= m``:
    ``Var <= (2/(m-1) + 2/(m-1)^2) |X|^2 |Y|^2``. The input side of a TensorSketch with ``d_in <= m`` is
    ``h(j) = j`` (the random output side and the random signs carry the bound), which lets kernels read
    activations as they lie in memory.
``block`` (opt-in, for the ``shear`` kernel of docs/kernels.md)
    As balanced, but the output side with ``d_out < m`` lies at random in as few random blocks of ``R = gcd(m, 16)``
    consecutive buckets as hold it, though at least half of all blocks. Coordinates that share a block are a short
    distance apart more often than by chance: ``Var <= 2 p |X|^2 |Y|^2`` with ``p`` of
    :func:`largest_difference_probability`, at most about twice the balanced bound.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

HashFamily: TypeAlias = Literal["balanced", "iid", "block"]
Role: TypeAlias = Literal["vector", "out", "in"]

HASH_FORMAT = "sdi-hash-1"
HASH_FAMILIES: tuple[str, ...] = get_args(HashFamily)
MAX_SKETCH_SIZE = 1 << 24
"""Largest number of buckets: beyond it fp32 counters and int32 offsets of the kernels are no longer exact."""

BLOCK_BUCKETS = 16
"""Consecutive buckets that belong together in the ``block`` family (fewer where they do not divide ``m``)."""

MAX_SHEAR_SIZE = 1 << 14
"""Largest sketch size of the ``shear`` kernel, which looks at all blocks of the table at its start."""


def _words(seed: int, name: str, role: str, count: int) -> npt.NDArray[np.uint64]:
    """``count`` raw 64-bit words of the stream keyed by (format, seed, name, role)."""
    label = json.dumps([HASH_FORMAT, int(seed), name, role], ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.blake2b(label.encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return np.asarray(np.random.Philox(key=key).random_raw(count), dtype=np.uint64)


def _permutation(seed: int, name: str, role: str, size: int) -> npt.NDArray[np.int64]:
    return np.argsort(_words(seed, name, role, size), kind="stable").astype(np.int64)


def draw_signs(d: int, *, seed: int, name: str, role: Role) -> npt.NDArray[np.int8]:
    """Signs ``s(i)``: int8 array of shape ``(d,)`` with values -1 and +1."""
    top_bit = (_words(seed, name, f"{role}/sign", d) >> np.uint64(63)).astype(np.int8)
    return np.asarray(1 - 2 * top_bit, dtype=np.int8)


def draw_buckets(d: int, m: int, *, seed: int, name: str, role: Role, hashing: HashFamily) -> npt.NDArray[np.int32]:
    """Buckets ``h(i)``: int32 array of shape ``(d,)`` with values in ``[0, m)``, drawn from family ``hashing``."""
    stream = f"{role}/bucket"
    if hashing == "iid":
        # Multiply-shift of the high 32 bits: exact integer arithmetic, bias below m * 2**-32.
        high = _words(seed, name, stream, d) >> np.uint64(32)
        return ((high * np.uint64(m)) >> np.uint64(32)).astype(np.int32)
    if hashing not in ("balanced", "block"):
        raise ValueError(f"hashing: got {hashing!r}; use one of {', '.join(map(repr, HASH_FAMILIES))}")
    if role == "in" and d <= m:
        return np.arange(d, dtype=np.int32)
    if hashing == "block" and role == "out" and d < m:
        size = block_size(m)
        blocks = _permutation(seed, name, f"{role}/block", m // size)[: used_blocks(d, m)]
        slots = _permutation(seed, name, stream, len(blocks) * size)[:d]
        return (size * blocks[slots // size] + slots % size).astype(np.int32)
    if d <= m:
        return _permutation(seed, name, stream, m)[:d].astype(np.int32)
    full, rest = divmod(d, m)
    # `rest` buckets, chosen at random, take one coordinate more; then coordinates are dealt out at random.
    extra = _permutation(seed, name, f"{stream}/extra", m)[:rest]
    slots = np.concatenate([np.tile(np.arange(m, dtype=np.int64), full), extra])
    buckets = np.empty(d, dtype=np.int32)
    buckets[_permutation(seed, name, stream, d)] = slots
    return buckets


def block_size(m: int) -> int:
    """Buckets of a block in the ``block`` family: ``R = gcd(m, 16)``."""
    return math.gcd(m, BLOCK_BUCKETS)


def used_blocks(d: int, m: int) -> int:
    """Blocks that the output side of the ``block`` family with ``d < m`` is dealt out to.

    With fewer than half of all blocks, coordinates that share one would set a floor under the variance that no
    sketch size lowers.
    """
    size = block_size(m)
    return max(-(-d // size), -(-m // (2 * size)))


def difference_probability(difference: int, d: int, m: int) -> float:
    """``P[h(i) - h(k) = difference mod m]``, ``i != k``, on the output side of the ``block`` family with ``d < m``.

    ``difference`` is any integer that is no multiple of ``m``; docs/design.md has the derivation.
    """
    size = block_size(m)
    blocks, used = m // size, used_blocks(d, m)
    near = min(difference % m, -difference % m)
    together = (size - 1) / max(1, used * size - 1)
    probability = 0.0
    if near < size:
        ways = sum(size - x for x in (near, m - near) if x < size)  # r_i - r_k is near, or m - near the other way round
        probability += together * ways / (size * max(1, size - 1))
    if blocks > 1:
        # In different blocks, q or q + 1 of them apart: both offsets are uniform, so their difference is triangular.
        q, s = divmod(difference % m, size)
        apart = (size - s) * (q % blocks != 0) + s * ((q + 1) % blocks != 0)
        probability += (1 - together) * apart / (size * size * (blocks - 1))
    return probability


def largest_difference_probability(d: int, m: int) -> float:
    """The largest of :func:`difference_probability` over all differences: ``Var <= 2 p |X|^2 |Y|^2``."""
    return max((difference_probability(x, d, m) for x in range(1, min(m, BLOCK_BUCKETS + 1))), default=1.0)


def inverse_table(buckets: npt.NDArray[np.int32], signs: npt.NDArray[np.int8], m: int) -> npt.NDArray[np.int32]:
    """Bucket -> signed sources, so that kernels can *gather* a CountSketch instead of scattering it.

    Returns an int32 array of shape ``(m, c)`` with ``c`` the largest number of coordinates in a bucket (at least
    1): entry ``+(i + 1)`` or ``-(i + 1)`` means "add or subtract coordinate ``i``", 0 means empty. Sources of a
    bucket are in increasing order of ``i``.
    """
    counts = np.bincount(buckets, minlength=m)
    width = max(1, int(counts.max(initial=0)))
    order = np.argsort(buckets, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.arange(len(buckets)) - starts[buckets[order]]
    table = np.zeros((m, width), dtype=np.int32)
    table[buckets[order], rank] = (order + 1) * signs[order]
    return table
