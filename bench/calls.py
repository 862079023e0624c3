"""What the capture does on the host for each torch call of a model: small looped models, one example a batch.

    python -m bench.calls
    python -m bench.calls --keep [--before FILE]    # kept: docs/capture.md states its figures

Operations on so little data take next to no time, so that what is left is Python and dispatch: on a GPU the host's
part of a featurize call. Counted are the torch calls of one forward pass and loss; the plain step (forward and
backward) and a featurize call, as a user makes it, take turns. Processor time of one thread, the shortest of the
rounds. ``--before`` puts figures beside that this command gave (``--json``) with an earlier commit; a kept file has
them already.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import stepinfluence
import torch
from stepinfluence.models.gpt import LoopedGPT, LoopedGPTConfig
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bench.models import cases, packages
from bench.models.cases import Task
from bench.provenance import Provenance, add_output, machine_line, write

CASES = {c.name: c for c in (*cases.CASES, *packages.CASES)}
CHOSEN = ("gated block", "routed experts", "ALBERT (transformers)", "Mixtral (transformers), eager")


class Count(TorchFunctionMode):
    """Counts the torch calls within it."""

    calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def looped_gpt() -> Task:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 32, "n_heads": 2, "n_prelude": 1, "n_core": 1, "n_coda": 1, "steps": 8}
    model = LoopedGPT(LoopedGPTConfig(**sizes)).eval()
    batch = {name: torch.randint(32, (1, 8)) for name in ("tokens", "labels")}

    def loss(given: Any, one: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(given(one["tokens"]).transpose(1, 2), one["labels"], reduction="none").mean(1)

    return Task(model, batch, ["core"], loss)


def tasks() -> dict[str, Callable[[], Task]]:
    """Small models with a batch of one; those whose packages are not installed are left out."""
    found: dict[str, Callable[[], Task]] = {"looped GPT": looped_gpt}
    for name in CHOSEN:
        if all(find_spec(package) is not None for package in CASES[name].packages):
            found[name] = lambda name=name: CASES[name].make(False)  # type: ignore[misc]
    return found


def measure(task: Task, rounds: int) -> dict[str, float]:
    batch = pytree.tree_map_only(Tensor, lambda t: t[:1], task.batch)
    body = [task.model.get_submodule(name) for name in task.body]
    capture = stepinfluence.attach(task.model, body=body, sketch_size=64)
    with Count() as count:
        task.loss(task.model, batch)

    def plain() -> None:
        task.model.zero_grad()
        task.loss(task.model, batch).mean().backward()

    def featurize() -> None:
        capture.featurize([batch], task.loss, progress=False)

    seconds: dict[str, list[float]] = {"plain": [], "featurize": []}
    featurize()
    for _ in range(rounds):
        for name, call in (("plain", plain), ("featurize", featurize)):
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    step, whole = (1e3 * min(times) for times in seconds.values())
    more = 1e3 * (whole - step) / count.calls
    return {"calls": count.calls, "plain_ms": step, "featurize_ms": whole, "more_us_a_call": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--before", type=Path, help="a file of this command, with an earlier commit")
    add_output(parser, "calls")
    options = parser.parse_args()
    torch.set_num_threads(1)
    provenance, rows = Provenance(), {}
    before = json.loads(options.before.read_text(encoding="utf-8")) if options.before is not None else None
    if before is None and options.json is not None and options.json.is_file():
        before = json.loads(options.json.read_text(encoding="utf-8"))["before"]
    for name, make in tasks().items():
        rows[name] = measure(make(), options.rounds)
        print(name, " ".join(f"{key} {value:.4g}" for key, value in rows[name].items()), flush=True)
        write(options.json, provenance, {"rounds": options.rounds, "rows": rows, "before": before})
    print(machine_line(provenance.finish()))


if __name__ == "__main__":
    main()
