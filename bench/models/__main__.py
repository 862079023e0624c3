"""Looped models of many kinds: is the capture right, and what does it cost.

    pip install -c constraints.txt -r bench/models/requirements.txt   # for models of others, which else are skipped
    python -m bench.models --keep                     # every row that the kept file does not have yet
    python -m bench.models --keep --anew [NAME ...]   # these again

For each model: the largest relative error of an example's exact gradients against autograd on a batch of one; that of
the captured features against the sketches, by their definition, of exact gradients (both of a small model, which is
float64 wherever its operations are); the relative error that sketching itself makes in the influence of all pairs by
step (m = 2048); and the processor time, of one thread, of a featurize call, as a user makes it, on one batch of a
larger model in float32, over that of a plain forward and backward pass (medians; the two take turns).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import stepinfluence
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.models import cases, packages
from bench.models.cases import Case, Task
from bench.provenance import Provenance, add_output, write
from sdi_kernels import CountSketch, reference

CASES = [*cases.CASES, *packages.CASES]
SKETCH_SIZE = 2048


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Of an example's row, relative to its norm."""
    error = (found.double() - expected.double()).flatten(1).norm(dim=1)
    return float((error / expected.double().flatten(1).norm(dim=1).clamp(min=1e-30)).max())


def in_double(task: Task) -> Task:
    """The task in float64, where its operations are there for it."""
    try:
        model = task.model.double()
        batch = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, task.batch)
        with torch.no_grad():
            task.loss(model, batch)
        return Task(model, batch, task.body, task.loss)
    except RuntimeError:
        return Task(task.model.float(), task.batch, task.body, task.loss)


def one_by_one(task: Task, names: list[str]) -> Tensor:
    """``(B, D)``: gradients of the body's parameters by plain autograd, each example in a batch of its own."""
    parameters = dict(task.model.named_parameters())
    wanted = [parameters[name] for name in names]
    rows = []
    for k in range(len(task.loss(task.model, task.batch))):
        one = pytree.tree_map_only(Tensor, lambda t, k=k: t[k : k + 1], task.batch)
        grads = torch.autograd.grad(task.loss(task.model, one)[0], wanted, allow_unused=True)
        rows.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                               for p, g in zip(wanted, grads, strict=True)]))  # fmt: skip
    return torch.stack(rows)


def errors(case: Case) -> dict[str, Any]:
    """The three errors, and how owners of rows became known."""
    task = in_double(case.make(False))
    body = [task.model.get_submodule(name) for name in task.body]
    exact = stepinfluence.ExactCapture(task.model, body=body).featurize([task.batch], task.loss, progress=False)
    capture = stepinfluence.attach(task.model, body=body, sketch_size=SKETCH_SIZE)
    sketched = capture.featurize([task.batch], task.loss, progress=False)
    blocks = []
    for target, block in zip(capture.targets, exact.space.blocks, strict=True):
        grads = exact.values[..., block.start : block.stop].double()
        sketch = target.sketch
        if isinstance(sketch, CountSketch):
            blocks.append(reference.count_sketch(grads, sketch))
        else:
            blocks.append(reference.tensor_sketch(grads.unflatten(-1, (sketch.d_out, sketch.d_in)), sketch))
    truth, found = (torch.einsum("nd,msd->nms", f.values.sum(1), f.values) for f in (exact, sketched))
    return {
        "dtype": str(exact.values.dtype).removeprefix("torch."),
        "exact_error": largest_error(exact.values.sum(1), one_by_one(task, [b.name for b in exact.space.blocks])),
        "capture_error": largest_error(sketched.values, torch.cat(blocks, -1)),
        "sketch_error": float((found - truth).norm() / truth.norm()),
        "owners": capture.owners,
    }


def cost(case: Case, rounds: int) -> dict[str, float]:
    """Medians of seconds, and of ratios to the plain step."""
    task = case.make(True)
    capture = stepinfluence.attach(
        task.model, body=[task.model.get_submodule(n) for n in task.body], sketch_size=SKETCH_SIZE
    )

    def plain() -> None:
        task.model.zero_grad()
        task.loss(task.model, task.batch).mean().backward()

    def featurize(per_step: bool) -> None:
        capture.featurize([task.batch], task.loss, per_step=per_step, progress=False)

    def seconds(call: Any) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    calls = {"plain": plain, "steps": lambda: featurize(True), "summed": lambda: featurize(False)}
    for call in calls.values():
        call()
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    return {
        "plain_seconds": statistics.median(t["plain"] for t in times),
        "ratio": statistics.median(t["steps"] / t["plain"] for t in times),
        "ratio_summed": statistics.median(t["summed"] / t["plain"] for t in times),
    }


def measured(case: Case, rounds: int, provenance: Provenance) -> dict[str, Any]:
    facts = provenance.finish()
    versions = {name: version(name.replace("_", "-")) for name in case.packages}
    row = {"name": case.name, "asked": case.asked, "packages": versions, "commit": facts["commit"]}
    return {**row, "date": facts["date"], **errors(case), **cost(case, rounds)}


HEAD = ("model or package", "asked", "exact error", "capture error", "sketch error", "cost", "summed", "owners")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    versions = "".join(f" {v}" for v in row["packages"].values())
    small = "" if row["dtype"] == "float64" else f" ({row['dtype']})"
    return [
        row["name"] + versions, row["asked"], f"{row['exact_error']:.0e}{small}", f"{row['capture_error']:.0e}{small}",
        f"{row['sketch_error']:.3f}", f"{row['ratio']:.2f}", f"{row['ratio_summed']:.2f}", row["owners"],
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows, by the beginning of their names; else all")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--anew", action="store_true", help="measure rows again that the file has")
    add_output(parser, "models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path: Path | None = options.json
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path is not None and path.is_file() else []
    rows = {row["name"]: row for row in kept}
    provenance = Provenance()
    print(" | ".join(HEAD))
    for case in CASES:
        if options.names and not any(case.name.startswith(name) for name in options.names):
            continue
        if missing := [name for name in case.packages if find_spec(name) is None]:
            print(f"{case.name}: skipped, {', '.join(missing)} is not installed (bench/models/requirements.txt)")
            continue
        if options.anew or case.name not in rows:
            rows[case.name] = measured(case, options.rounds, provenance)
            ordered = [rows[c.name] for c in CASES if c.name in rows]
            write(path, provenance, {"sketch_size": SKETCH_SIZE, "rounds": options.rounds, "rows": ordered})
        print(" | ".join(cells(rows[case.name])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
