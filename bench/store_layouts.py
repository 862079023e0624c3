"""Error of influence against bytes per example, over the ways of storing features (docs/store.md).

    python -m bench.store_layouts                   # both models, a few minutes on one thread
    python -m bench.store_layouts --models gpt --quick
    python -m bench.store_layouts --keep            # kept: docs/store.md is made from it

Exact gradients of a small trained model at three checkpoints are sketched with the kernels' own tables (and checked to
be what attach() makes of them), stored and read back, and the scores of all pairs of training examples and queries
compared with the exact ones. Bytes are those of one
training example, summed over loop steps, at all checkpoints. Errors are relative, in the Frobenius norm: of SDI over
(example, query, step), of TracIn over (example, query); means over seeds of the hash tables. Training examples and
queries are different, so there is no self-influence in it, which would make any sketch look good.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from stepinfluence import ExactCapture, Features, FeatureSpace, allocate_sizes, attach, influence
from stepinfluence.capture.body.targets import Target, make_targets
from stepinfluence.capture.recording.sketching import make_blocks
from stepinfluence.store import STORE_DTYPES, StoreDtype, bytes_per_row, decode, encode, fold
from torch import Tensor

from bench.layout_models import Case, gpt, parity
from bench.provenance import Provenance, add_output, machine_line, write
from sdi_kernels import CountSketch, HashFamily

Plan = Literal["concat", "sum", "energy"]
PAPER_M = 2048
HASHINGS: tuple[HashFamily, ...] = ("iid", "balanced")


@dataclass(frozen=True)
class Layout:
    """One way of storing features. ``m`` is the mean number of columns per parameter that the budget allows."""

    hashing: HashFamily
    plan: Plan
    m: int
    dtype: StoreDtype
    folded: bool

    def __str__(self) -> str:
        folded = ", folded" if self.folded else ""
        plan = {"concat": "concat", "sum": "sum", "energy": "concat by energy"}[self.plan]
        return f"{self.hashing}, {plan}, m = {self.m}, {self.dtype}{folded}"


@dataclass(frozen=True)
class Row:
    """A layout's figures: bytes of an example, relative errors of SDI and TracIn, their largest over seeds."""

    layout: Layout
    bytes: int
    sdi: float
    tracin: float
    sdi_worst: float


PAPER = Layout("iid", "concat", PAPER_M, "fp32", False)


class Subject:
    """A case with its exact gradients and scores."""

    def __init__(self, case: Case, name: str) -> None:
        self.name, self.case = name, case
        self.etas = [eta for _, eta in case.checkpoints]
        capture = ExactCapture(case.model, body=case.body)
        self.train: list[Features] = []
        self.query: list[Features] = []
        for state, _ in case.checkpoints:
            case.model.load_state_dict(state)
            self.train.append(capture.featurize(case.train, case.loss, per_step=False, progress=False))
            self.query.append(capture.featurize(case.query, case.loss, progress=False))
        self.parameters = capture.parameters
        self.exact = influence(self.train, self.query, etas=self.etas).sdi
        self._columns = [self._by_parameter(side) for side in (self.train, self.query)]
        pilot = attach(case.model, body=case.body, sketch_size=256, verify=False)
        self.pilot = [
            pilot.featurize(case.pilot, case.loss, per_step=False),
            pilot.featurize(case.query[:1], case.loss),
        ]

    def targets(self, hashing: HashFamily, plan: Plan, m: int, seed: int) -> list[Target]:
        """Sketches within a budget of ``m`` columns for each parameter."""
        columns = m * len(self.parameters)
        sizes: int | Mapping[str, int] = {"concat": m, "sum": columns, "energy": 0}[plan]
        if plan == "energy":  # less the four bytes of a scale, to stay within the bytes of a row
            sizes = allocate_sizes(self.pilot[0], self.pilot[1], width=columns - 4)
        layout: Literal["concat", "sum"] = "sum" if plan == "sum" else "concat"
        return make_targets(self.parameters, sketch_size=sizes, hashing=hashing, seed=seed, layout=layout)

    @staticmethod
    def _by_parameter(side: Sequence[Features]) -> list[list[Tensor]]:
        """Exact gradients of each checkpoint and parameter, ``(numel, rows)``."""
        return [[f.values[..., b.start : b.stop].flatten(0, -2).T.contiguous() for b in f.space.blocks] for f in side]

    def sketched(self, targets: Sequence[Target], plan: Plan) -> list[list[Features]]:
        """Sketches of the exact gradients, for training examples and queries."""
        blocks = make_blocks(targets, "sum" if plan == "sum" else "concat")
        operators = [_operator(target) for target in targets]
        sides = []
        for exact, columns in zip((self.train, self.query), self._columns, strict=True):
            side = []
            for f, parts in zip(exact, columns, strict=True):
                values = torch.zeros(blocks[-1].stop, parts[0].shape[1])
                for operator, block, part in zip(operators, blocks, parts, strict=True):
                    values[block.start : block.stop] += torch.sparse.mm(operator, part)
                space = FeatureSpace("sketch", tuple(blocks), "", f.space.weights)
                shaped = values.T.reshape(*f.values.shape[:-1], -1)
                side.append(Features(shaped, f.losses, f.steps, f.lengths, f.ids, space))
            sides.append(side)
        return sides

    def check(self) -> None:
        """Refuse to report on other sketches than those that :func:`attach` makes."""
        self.case.model.load_state_dict(self.case.checkpoints[0][0])
        for plan, layout in (("concat", "concat"), ("sum", "sum")):
            m = 256 if plan == "concat" else 256 * len(self.parameters)
            capture = attach(self.case.model, body=self.case.body, sketch_size=m, layout=layout)  # type: ignore[arg-type]
            wanted = capture.featurize(self.case.train[:1], self.case.loss, per_step=False).values
            found = self.sketched(self.targets("balanced", plan, 256, 0), plan)[0][0].values[: len(wanted)]  # type: ignore[arg-type]
            if _relative(found, wanted) > 1e-3:
                raise SystemExit(f"the {plan} sketches are not those of attach(): no figures")

    def errors(
        self, train: Sequence[Features], query: Sequence[Features], etas: Sequence[float]
    ) -> tuple[float, float]:
        found = influence(train, query, etas=etas).sdi
        return _relative(found, self.exact), _relative(found.sum(2), self.exact.sum(2))


def _operator(target: Target) -> Tensor:
    """A sketch as a sparse matrix ``(m, numel)``: one entry of +1 or -1 in every column."""
    sketch = target.sketch
    if isinstance(sketch, CountSketch):
        bucket, sign, _ = sketch.tables()
    else:
        h_out, s_out, _, h_in, s_in, _ = sketch.tables()
        bucket = ((h_out.long()[:, None] + h_in) % sketch.m).flatten()
        sign = (s_out[:, None] * s_in).flatten()
    place = torch.stack([bucket.long(), torch.arange(len(bucket))])
    return torch.sparse_coo_tensor(place, sign.float(), (sketch.m, len(bucket)), check_invariants=False).coalesce()


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _stored(features: Features, dtype: StoreDtype) -> Features:
    """As a store gives it back."""
    codes, scales = encode(features.values, dtype)
    array = codes.view(torch.int16).numpy().view("<u2") if dtype == "bf16" else codes.numpy()
    values = decode(array, None if scales is None else scales.numpy(), dtype)
    return Features(
        values, features.losses, features.steps, features.lengths, features.ids, features.space, features.step_labels
    )


def measure(subject: Subject, sizes: Sequence[int], seeds: int) -> Iterator[Row]:
    """Every layout at every size."""
    for hashing in HASHINGS:
        for plan in get_args(Plan):
            for m in sizes:
                found: dict[tuple[StoreDtype, bool], list[tuple[float, float]]] = {}
                width = 0
                for seed in range(seeds):
                    train, query = subject.sketched(subject.targets(hashing, plan, m, seed), plan)
                    width = train[0].values.shape[-1]
                    one = [fold(side, subject.etas, seed=seed) for side in (train, query)]
                    for dtype in STORE_DTYPES:
                        code: StoreDtype = dtype  # type: ignore[assignment]  # the literals of that tuple
                        sides = [[_stored(f, code) for f in side] for side in (train, query)]
                        found.setdefault((code, False), []).append(subject.errors(sides[0], sides[1], subject.etas))
                        pair = [[_stored(f, code)] for f in one]
                        found.setdefault((code, True), []).append(subject.errors(pair[0], pair[1], [1.0]))
                for (code, folded), errors in found.items():
                    size = bytes_per_row(width, code) * (1 if folded else len(subject.etas))
                    sdi, tracin = torch.tensor(errors).T
                    yield Row(
                        Layout(hashing, plan, m, code, folded), size, float(sdi.mean()), float(tracin.mean()),
                        float(sdi.max()),
                    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Tables


def _table(rows: Sequence[Row], paper: Row) -> str:
    lines = ["| layout | bytes per example | of the paper's | SDI error | TracIn error |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.layout} | {r.bytes:,} | {_share(r.bytes / paper.bytes)} | {r.sdi:.4f} | {r.tracin:.4f} |" for r in rows
    ]
    return "\n".join(lines)


def _share(ratio: float) -> str:
    return "1" if ratio == 1 else f"1/{1 / ratio:.1f}"


def report(subject: Subject, rows: Sequence[Row]) -> str:
    """Markdown: from the paper's layout to an eighth of its bytes step by step, then everything."""
    by_layout = {row.layout: row for row in rows}
    paper = by_layout[PAPER]
    half, balanced = PAPER_M // 2, ("balanced", "concat")
    path = [
        PAPER,
        Layout(*balanced, PAPER_M, "fp32", False),  # type: ignore[arg-type]
        Layout(*balanced, PAPER_M, "int8", False),  # type: ignore[arg-type]
        Layout(*balanced, half, "int8", False),  # type: ignore[arg-type]
        Layout("balanced", "energy", half, "int8", False),
        Layout("balanced", "sum", half, "int8", False),
        Layout("balanced", "energy", half, "int8", True),
        Layout("balanced", "sum", half, "int8", True),
    ]
    eighth = [r for r in rows if r.bytes <= paper.bytes / 8]
    best = min(eighth, key=lambda r: r.sdi)
    met = [r for r in rows if r.sdi <= paper.sdi]
    smallest = min(met, key=lambda r: r.bytes)
    vectors = sum(p.dim() <= 1 for p in subject.parameters.values())
    numbers = sum(p.numel() for p in subject.parameters.values())
    case = subject.case
    steps, checkpoints = subject.exact.shape[2], len(subject.etas)
    asked = f"{len(subject.query[0])} queries of {steps} steps, {checkpoints} checkpoints"
    sizes = f"{len(subject.train[0])} training examples, {asked}"
    verdict = (
        f"Within an eighth of the paper's bytes, the least SDI error is {best.sdi:.4f} ({best.layout}), the paper's is "
        f"{paper.sdi:.4f}: the aim is {'met' if best.sdi <= paper.sdi else 'missed'}. The fewest bytes with no more "
        f"error than the paper's are {smallest.bytes:,}, {_share(smallest.bytes / paper.bytes)} of its "
        f"({smallest.layout})."
    )
    return "\n".join(
        [
            f"### {case.name}",
            "",
            f"{len(subject.parameters)} body parameters, {vectors} of them vectors, {numbers:,} numbers; {sizes}.",
            "",
            _table([by_layout[p] for p in path if p in by_layout], paper),
            "",
            verdict,
            "",
            "<details><summary>All layouts</summary>",
            "",
            _table(sorted(rows, key=lambda r: (r.bytes, r.sdi)), paper),
            "",
            "</details>",
            "",
        ]
    )


def described(subject: Subject) -> dict[str, Any]:
    """What the figures of a model are about."""
    return {
        "model": subject.case.name,
        "parameters": len(subject.parameters),
        "vectors": sum(p.dim() <= 1 for p in subject.parameters.values()),
        "numbers": sum(p.numel() for p in subject.parameters.values()),
        "train": len(subject.train[0]),
        "query": len(subject.query[0]),
        "steps": subject.exact.shape[2],
        "checkpoints": len(subject.etas),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["gpt", "parity"], default=["gpt", "parity"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[PAPER_M, PAPER_M // 2, PAPER_M // 8])
    parser.add_argument("--seeds", type=int, default=3, help="draws of the hash tables")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="hardly trained models and few examples, in a minute")
    add_output(parser, "store-layouts")
    args = parser.parse_args()
    if PAPER_M not in args.sizes:
        parser.error(f"--sizes: must have {PAPER_M}, the paper's, which the others are compared with")
    torch.set_num_threads(args.threads)
    n_train, n_query = (32, 8) if args.quick else (96, 16)
    provenance = Provenance()
    results: dict[str, Any] = {"seeds": args.seeds}
    for name in args.models:
        if name == "gpt":
            case = gpt(20 if args.quick else 250, n_train, n_query)
        else:
            case = parity(24 if args.quick else 300, n_train, n_query)
        subject = Subject(case, name)
        subject.check()
        rows = list(measure(subject, args.sizes, args.seeds))
        print(report(subject, rows), flush=True)
        results[name] = {**described(subject), "rows": [asdict(row) for row in rows]}
    print(machine_line(provenance.finish()))
    write(args.json, provenance, results)


if __name__ == "__main__":
    main()
