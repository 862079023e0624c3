"""Variance of sketched inner products, measured and exact, for every hash family (docs/design.md).

    python -m bench.variance_table --keep                # the table of docs/design.md
    python -m bench.variance_table --trials 200 --seed 1

A row prints m * Var / (|X|^2 |Y|^2) of <TS(X), TS(Y)> over draws of the tables: measured, then what the formula of
docs/design.md says. Draw t has seed t of the format "sdi-hash-1", and the matrices come from --seed: the same numbers
on every machine, up to rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sdi_kernels import HASH_FAMILIES, HashFamily, TensorSketch
from sdi_kernels.hashing import difference_probability
from sdi_kernels.variance import matrix_bound, pair_probabilities

Array = npt.NDArray[np.float64]


class Case(NamedTuple):
    name: str
    x: Array
    y: Array
    m: int


def cases(seed: int) -> list[Case]:
    """The matrices of the table: what gradients can look like at their worst, and a generic pair."""
    draw = np.random.default_rng(seed).standard_normal
    u, v, w = draw((64, 1)), draw((1, 48)), draw((1, 48))
    gaussian, ones, wide = draw((64, 48)), np.ones((64, 48)), np.ones((96, 160))
    halves = np.zeros((64, 96))
    halves[:, [5, 69]] = 1
    return [
        Case("all ones 64×48", ones, ones, 128),
        Case("rank one 64×48", u * v, u * v, 128),
        Case("shared left factor 64×48", u * v, u * w, 128),
        Case("gaussian 64×48, X = Y", gaussian, gaussian, 128),
        Case("two columns m/2 apart, 64×96", halves, halves, 128),
        Case("all ones 96×160 (d > m)", wide, wide, 64),
    ]


# ---------------------------------------------------------------------------------------------------------------
# The formula of docs/design.md


def exact_variance(x: Array, y: Array, m: int, hashing: HashFamily) -> float:
    """Var <TS(X), TS(Y)> over the tables of a family."""
    (d_out, d_in), x2, y2 = x.shape, x**2, y**2
    k_out, k_in, pi, rho = pair_probabilities(d_out, d_in, m, hashing)
    columns, rows = x.T @ y, x @ y.T
    columns_diagonal, rows_diagonal = (np.diag(columns) ** 2).sum(), (np.diag(rows) ** 2).sum()
    same_row, same_column = (x2.sum(1) * y2.sum(1)).sum(), (x2.sum(0) * y2.sum(0)).sum()
    same = (x2 * y2).sum()
    t1 = (columns**2).sum() - columns_diagonal
    t3 = (rows**2).sum() - rows_diagonal
    t5 = np.trace(columns @ columns) - columns_diagonal
    t6 = np.trace(rows @ rows) - rows_diagonal
    t7 = x2.sum() * y2.sum() - same_row - same_column + same
    t8 = (x * y).sum() ** 2 - rows_diagonal - columns_diagonal + same
    pairs = pi * (t7 + t8)
    if hashing == "block" and d_out < m and d_in <= m:
        # One probability for each distance of two columns; V_pair of every pair of columns.
        weights = [0.0, *(difference_probability(b, d_out, m) for b in range(1, m))]
        weight = np.array(weights)[np.subtract.outer(np.arange(d_in), np.arange(d_in)) % m]
        totals, products = (x2.sum(0), y2.sum(0)), (x * y).sum(0)
        of_columns = np.outer(*totals) - x2.T @ y2 + np.outer(products, products) - (x * y).T @ (x * y)
        pairs = (weight * of_columns).sum()
    if hashing != "iid" and d_in <= m and m > 1:
        t24 = 0.0
        if m % 2 == 0:  # columns m/2 apart, each pair in both orders
            near, far = slice(0, max(0, d_in - m // 2)), slice(m // 2, None)
            for j, k in ((near, far), (far, near)):
                t24 += (((x[:, j] * y[:, k]).sum(0)) ** 2).sum() - (x2[:, j] * y2[:, k]).sum()
                t24 += ((x[:, j] * x[:, k]).sum(0) * (y[:, j] * y[:, k]).sum(0)).sum()
                t24 -= (x[:, j] * x[:, k] * y[:, j] * y[:, k]).sum()
    else:
        t24 = t1 - same_row + same + t3 - same_column + same
    return float(k_in * (t1 + t5) + k_out * (t3 + t6) + pairs + rho * t24)


# ---------------------------------------------------------------------------------------------------------------
# The measurement


def inner_products(x: Array, y: Array, m: int, hashing: HashFamily, trials: int) -> Array:
    """``<TS(X), TS(Y)>`` for each of ``trials`` draws of the tables, straight from the definition: ``(trials,)``."""
    (d_out, d_in), results = x.shape, []
    chunk = max(1, 2**22 // x.size)
    for start in range(0, trials, chunk):
        sketches = [
            TensorSketch(d_out, d_in, m, seed=t, name="w", hashing=hashing)
            for t in range(start, min(trials, start + chunk))
        ]
        h_out, h_in, s_out, s_in = (
            np.stack([getattr(getattr(s, side), table) for s in sketches]).astype(np.int64)
            for table, side in (("bucket", "out"), ("bucket", "inp"), ("sign", "out"), ("sign", "inp"))
        )
        offset = m * np.arange(len(sketches))[:, None, None]
        position = ((h_out[:, :, None] + h_in[:, None, :]) % m + offset).ravel()
        sign = s_out[:, :, None] * s_in[:, None, :]
        tx, ty = (np.bincount(position, (sign * matrix).ravel(), m * len(sketches)).reshape(-1, m) for matrix in (x, y))
        results.append((tx * ty).sum(1))
    return np.concatenate(results)


def normalised(variance: float, case: Case) -> float:
    return case.m * variance / float((case.x**2).sum() * (case.y**2).sum())


def main(arguments: Sequence[str] | None = None) -> None:
    from bench.provenance import Provenance, add_output, write  # needs torch, which the formulas do not

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=1500, help="draws of the tables (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random matrices (default: %(default)s)")
    add_output(parser, "variance-table")
    options = parser.parse_args(arguments)
    provenance, rows = Provenance(), []
    print(f"m·Var/(‖X‖²‖Y‖²), {options.trials} draws, matrices of seed {options.seed}")
    print()
    header = [f"{family} {what}" for family in HASH_FAMILIES for what in ("measured", "exact", "bound")]
    print("| matrices | m |", " | ".join(header), "|")
    print("|---|---|" + "---|" * len(header))
    for case in cases(options.seed):
        cells: list[float] = []
        for family in HASH_FAMILIES:
            measured = inner_products(case.x, case.y, case.m, family, options.trials).var(ddof=1)
            exact = exact_variance(case.x, case.y, case.m, family)
            limit = matrix_bound(*case.x.shape, case.m, family)
            cells += [normalised(measured, case), normalised(exact, case), case.m * limit]
        rows.append({"matrices": case.name, "m": case.m, "cells": cells})
        print(f"| {case.name} | {case.m} |", " | ".join(f"{cell:.2f}" for cell in cells), "|", flush=True)
    write(options.json, provenance, {"trials": options.trials, "seed": options.seed, "columns": header, "rows": rows})


if __name__ == "__main__":
    main()
