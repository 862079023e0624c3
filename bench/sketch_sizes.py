"""How large the sketches should be: error and rankings at several sizes, on the two small trained models.

    python -m bench.sketch_sizes --keep      # kept: docs/store.md and the FAQ are made from it

For each size m and hash family, over draws of the tables: the relative error (Frobenius norm) of SDI between training
examples and queries, which are different examples; of TracIn between them; of TracIn among the training examples with
their self-influence, as the paper measures it; and of the rankings of training examples by TracIn for each query, the
share of the exact ten most helpful among the sketched ten, and Spearman's correlation. Scores are sums over three
checkpoints. Sizes are those of every parameter (the paper's layout), in float32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from stepinfluence import Features, influence
from torch import Tensor

from bench.layout_models import gpt, parity
from bench.provenance import Provenance, add_output, machine_line, write
from bench.store_layouts import HASHINGS, Subject, described

K = 10
FIGURES = ("sdi", "tracin", "with_self", "top", "rank")


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def overlap(found: Tensor, exact: Tensor) -> float:
    """Share of the exact best K of each column among the found best K; ``(n_train, n_query)``, mean over queries."""
    pairs = zip(found.topk(K, dim=0).indices.T.tolist(), exact.topk(K, dim=0).indices.T.tolist(), strict=True)
    return statistics.mean(len(set(one) & set(other)) / K for one, other in pairs)


def spearman(found: Tensor, exact: Tensor) -> float:
    """Rank correlation of the columns, mean over queries (scores are real numbers: no ties)."""
    ranks = [scores.argsort(0).argsort(0).double() for scores in (found, exact)]
    one, other = (r - r.mean(0) for r in ranks)
    return float(((one * other).sum(0) / (one.norm(dim=0) * other.norm(dim=0))).mean())


def tracin(train: Sequence[Features], etas: Sequence[float]) -> Tensor:
    """Of all pairs of training examples, each with itself included: ``(n_train, n_train)``."""
    return torch.stack([eta * (f.values @ f.values.T) for f, eta in zip(train, etas, strict=True)]).sum(0)


def measure(subject: Subject, sizes: list[int], seeds: int) -> list[dict[str, Any]]:
    """One row for each family and size; every figure is a list over draws of the tables."""
    etas, between = subject.etas, subject.exact.sum(2)
    among = tracin(subject.train, etas)
    rows = []
    for hashing in HASHINGS:
        for m in sizes:
            row: dict[str, Any] = {"hashing": hashing, "m": m, **{name: [] for name in FIGURES}}
            for seed in range(seeds):
                train, query = subject.sketched(subject.targets(hashing, "concat", m, seed), "concat")
                found = influence(train, query, etas=etas)
                row["sdi"].append(relative(found.sdi, subject.exact))
                row["tracin"].append(relative(found.tracin, between))
                row["with_self"].append(relative(tracin(train, etas), among))
                row["top"].append(overlap(found.tracin, between))
                row["rank"].append(spearman(found.tracin, between))
            rows.append(row)
            print(
                f"{hashing:>9} m = {m:<5} " + ", ".join(f"{k} {statistics.mean(row[k]):.3f}" for k in FIGURES),
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--seeds", type=int, default=10, help="draws of the hash tables")
    parser.add_argument("--quick", action="store_true", help="hardly trained models and few examples")
    add_output(parser, "sketch-sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    provenance = Provenance()
    results: dict[str, Any] = {"seeds": options.seeds}
    n_train, n_query = (32, 8) if options.quick else (96, 16)
    for name, make, updates in (("gpt", gpt, (20, 250)), ("parity", parity, (24, 300))):
        subject = Subject(make(updates[not options.quick], n_train, n_query), name)
        subject.check()
        print(subject.case.name)
        results[name] = {**described(subject), "rows": measure(subject, options.sizes, options.seeds)}
    print(machine_line(provenance.finish()))
    write(options.json, provenance, results)


if __name__ == "__main__":
    main()
