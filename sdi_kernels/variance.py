"""What the variance of a sketched inner product cannot exceed (docs/design.md, "Variance")."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdi_kernels._checks import one_of, positive_int
from sdi_kernels.hashing import HASH_FAMILIES, HashFamily, difference_probability, largest_difference_probability


def collision(d: int, m: int, hashing: HashFamily) -> float:
    """Probability that two given coordinates of ``d`` share one of ``m`` buckets."""
    if hashing == "iid":
        return 1 / m
    if d < 2:
        return 0.0
    full, rest = divmod(d, m)
    return (rest * (full + 1) * full + (m - rest) * full * (full - 1)) / (d * (d - 1))


def pair_probabilities(d_out: int, d_in: int, m: int, hashing: HashFamily) -> tuple[float, float, float, float]:
    """(kappa_out, kappa_in, pi, rho) of docs/design.md; rho as it is where h_in(j) = j, for columns m/2 apart.

    Where pi depends on how far apart the columns are (``block`` with d_out < m, h_in(j) = j), it is the largest.
    """
    k_out, k_in = collision(d_out, m, hashing), collision(d_in, m, hashing)
    if m == 1:
        return k_out, k_in, 1.0, 1.0
    blocks = hashing == "block" and d_out < m
    half = 0.0 if m % 2 else difference_probability(m // 2, d_out, m) if blocks else (1 - k_out) / (m - 1)
    if hashing != "iid" and d_in <= m:
        return k_out, 0.0, largest_difference_probability(d_out, m) if blocks else (1 - k_out) / (m - 1), half
    differ_out, differ_in = (1 - k_out) / (m - 1), (1 - k_in) / (m - 1)
    pi = k_out * k_in + (m - 1) * differ_out * differ_in
    return k_out, k_in, pi, k_out * k_in + half * differ_in


def matrix_bound(d_out: int, d_in: int, m: int, hashing: HashFamily) -> float:
    """What ``Var <TS(X), TS(Y)> / (|X|^2 |Y|^2)`` cannot exceed.

    6/m + 4/m^2 for iid; 2/(m-1) for balanced with d_out, d_in <= m; about 2/d_out for block with d_out far below m.
    """
    k_out, k_in, pi, rho = pair_probabilities(d_out, d_in, m, hashing)
    contiguous = hashing != "iid" and d_in <= m and m > 1
    return 2 * (k_out + k_in + pi + (0.0 if contiguous else rho))


def variance_bound(shape: Sequence[int], m: int, hashing: HashFamily) -> float:
    """What the variance of the inner product of two sketches, over ``|X|^2 |Y|^2``, cannot exceed.

    Args:
        shape: of what is sketched: a vector by a CountSketch, all else by a TensorSketch as a matrix of
            ``(shape[0], prod(shape[1:]))``.
        m: buckets.
        hashing: the family of the tables.

    Returns:
        0 where the sketch is lossless: vectors of at most m entries, but for ``iid``.

    Raises:
        TypeError, ValueError: a size that is no positive integer, or no such family.
    """
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape: got {type(shape).__name__} {shape!r}; pass a tuple of positive integers")
    sizes = [positive_int("shape", size) for size in shape]
    positive_int("m", m)
    one_of("hashing", hashing, HASH_FAMILIES)
    if len(sizes) <= 1:
        return 2 * collision(math.prod(sizes), m, hashing)
    return matrix_bound(sizes[0], math.prod(sizes[1:]), m, hashing)
