"""Sketch sizes by measured gradient energy: a fixed number of columns, spent where it lowers the error most.

The error of a sketched inner product has variance ``c * sum_i |X_i|^2 |Y_i|^2 / m_i`` over the parameters ``i``
(docs/design.md). At a fixed total of ``m_i`` it is least where ``m_i`` is proportional to ``sqrt(|X_i|^2 |Y_i|^2)``,
the parameter's gradient energy; a vector kept at its own length has no error at all.
"""

from __future__ import annotations

import heapq
import math

from stepinfluence.arguments import boolean, positive_int
from stepinfluence.attribution.features import Features


def gradient_energies(features: Features) -> dict[str, float]:
    """Mean squared gradient norm of each parameter over examples, and summed over steps where features are per step.

    Sketched norms are unbiased estimates of the exact ones, so a small pass of either kind does.

    Raises:
        TypeError: no features.
        ValueError: no examples, values that are not finite, or features in the ``sum`` layout, which do not tell
            parameters apart.
    """
    if not isinstance(features, Features):
        raise TypeError(f"features: got {type(features).__name__}; pass Features of a capture")
    features.require_whole("features")
    if features.space.layout == "sum":
        raise ValueError("features: in the sum layout parameters share their columns; featurize with layout='concat'")
    if not len(features):
        raise ValueError("features: got no examples; featurize a few dozen")
    squares = features.values.square().sum(tuple(range(features.values.dim() - 1))) / len(features)
    if not bool(squares.isfinite().all()):
        raise ValueError("features: some are not finite, or too large to be squared; leave such examples out")
    return {b.name: float(squares[b.start : b.stop].sum()) for b in features.space.blocks}


def allocate_sizes(
    train: Features,
    query: Features | None = None,
    *,
    width: int,
    smallest: int = 16,
    powers_of_two: bool = True,
) -> dict[str, int]:
    """Sketch sizes by parameter, of at most ``width`` columns together: what ``attach(sketch_size=...)`` takes.

    Starts every parameter at ``smallest`` and gives columns where they lower the variance most per column, until none
    fit. A vector that is worth as many columns as it has entries gets exactly those, which balanced hashing makes
    lossless.

    Args:
        train: features of a few dozen training examples, exact or sketched, of one capture of the model.
        query: features of a few queries; the training examples' if not given.
        width: columns in all: bytes of a row are those of :func:`stepinfluence.store.bytes_per_row`.
        smallest: columns that a parameter gets at least (a short vector fewer: its length).
        powers_of_two: sizes of matrices are powers of two times ``smallest``, as the compiled FFT wants powers of two.

    Raises:
        TypeError, ValueError: ``width`` or ``smallest`` is no positive int.
        ValueError: ``width`` is too small for ``smallest`` columns each, or features cannot tell parameters apart.
    """
    positive_int("width", width)
    positive_int("smallest", smallest)
    boolean("powers_of_two", powers_of_two)
    left, right = gradient_energies(train), gradient_energies(query if query is not None else train)
    if left.keys() != right.keys():
        raise ValueError("query: features of other parameters than train's; featurize both with one capture")
    lengths = {b.name: math.prod(b.shape) if len(b.shape) <= 1 else None for b in train.space.blocks}
    sizes = {name: smallest if n is None else max(1, min(n, smallest)) for name, n in lengths.items()}
    if sum(sizes.values()) > width:
        raise ValueError(f"width: got {width}; {len(sizes)} parameters need at least {sum(sizes.values())} columns")

    def variance(name: str, m: int) -> float:
        length = lengths[name]
        return 0.0 if length is not None and m >= length else left[name] * right[name] / m

    def following(name: str) -> int:
        m, length = sizes[name], lengths[name]
        larger = 2 * m if powers_of_two else m + max(1, m // 64)
        return larger if length is None else length  # a vector is lossless or at its least

    def offer(name: str) -> tuple[float, int, str]:
        m = following(name)
        return (-(variance(name, sizes[name]) - variance(name, m)) / max(1, m - sizes[name]), m, name)

    free = width - sum(sizes.values())
    heap = [offer(name) for name, n in lengths.items() if n is None or n > sizes[name]]
    heapq.heapify(heap)
    while heap:
        gain, m, name = heapq.heappop(heap)
        if gain == 0 or m - sizes[name] > free:
            continue  # smaller ones may still fit
        free -= m - sizes[name]
        sizes[name] = m
        if lengths[name] is None:
            heapq.heappush(heap, offer(name))
    return sizes
