"""The smallest spec that still shows what a spec showed: greedy, one simplification after the other."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

from bench.fuzz.spec import Batch, Node, Spec


def shrink(spec: Spec, still: Callable[[Spec], bool], *, seconds: float = 30.0) -> Spec:
    """Apply simplifications while ``still`` holds, until none does or time is over."""
    end = time.monotonic() + seconds
    improved = True
    while improved:
        improved = False
        for candidate in simpler(spec):
            if time.monotonic() > end:
                return spec
            if still(candidate):
                spec, improved = candidate, True
                break
    return spec


def simpler(spec: Spec) -> Iterator[Spec]:
    """Specs with one thing less, the most rewarding first."""
    for body in fewer(spec.body):
        if body:
            yield changed(spec, body=body)
    for k in range(len(spec.batches)):
        if len(spec.batches) > 1:
            yield changed(spec, batches=spec.batches[:k] + spec.batches[k + 1 :])
    plain = {
        "summed": False, "loop": "plain", "running": False, "training": False, "attach": "whole", "readout": "tokens",
        "residual": "none",
    }  # fmt: skip
    for name, value in plain.items():
        if getattr(spec, name) != value:
            yield changed(spec, **{name: value})
    if spec.steps > 1:
        yield changed(spec, steps=spec.steps - 1)
    for k, batch in enumerate(spec.batches):
        for smaller in smaller_batches(batch):
            yield changed(spec, batches=[*spec.batches[:k], smaller, *spec.batches[k + 1 :]])
    if spec.d > 2:
        yield changed(spec, d=2)
    if spec.heads > 1:
        yield changed(spec, heads=1)
    for body in plainer(spec.body):
        yield changed(spec, body=body)


def changed(spec: Spec, **values: object) -> Spec:
    made = copy.deepcopy(spec)
    for name, value in values.items():
        setattr(made, name, copy.deepcopy(value))
    return made


def fewer(nodes: list[Node]) -> Iterator[list[Node]]:
    """Without a node, with one replaced by what is in it, or with less in it."""
    for k, node in enumerate(nodes):
        yield nodes[:k] + nodes[k + 1 :]
        if "inner" in node:
            yield nodes[:k] + node["inner"] + nodes[k + 1 :]
            for inner in fewer(node["inner"]):
                if inner:
                    yield [*nodes[:k], {**node, "inner": inner}, *nodes[k + 1 :]]


PLAINEST = {"op": "linear", "how": "module", "mode": "plain", "bias": False}


def plainer(nodes: list[Node]) -> Iterator[list[Node]]:
    """With an operation replaced by the plainest one, or its settings by the commonest."""
    settings = {"mode": "plain", "by": "ids", "skip": False, "experts": 2, "n": 2}
    for k, node in enumerate(nodes):
        if "inner" not in node and node != PLAINEST:
            yield [*nodes[:k], dict(PLAINEST), *nodes[k + 1 :]]
        for name, value in settings.items():
            if name in node and node[name] != value:
                yield [*nodes[:k], {**node, name: value}, *nodes[k + 1 :]]
        for inner in plainer(node.get("inner", [])):
            yield [*nodes[:k], {**node, "inner": inner}, *nodes[k + 1 :]]


def smaller_batches(batch: Batch) -> Iterator[Batch]:
    lengths = batch.lengths
    for k in range(len(lengths)):
        if len(lengths) > 1:
            yield Batch(lengths[:k] + lengths[k + 1 :], batch.width, batch.seed, batch.style)
    if batch.width > 2:
        width = batch.width // 2 if batch.width % 2 == 0 else batch.width - 1
        yield Batch([min(n, width) for n in lengths], width, batch.seed, batch.style)
    if batch.style != "random":
        yield Batch(lengths, batch.width, batch.seed)
    for k, n in enumerate(lengths):
        if n != batch.width:
            yield Batch([*lengths[:k], batch.width, *lengths[k + 1 :]], batch.width, batch.seed, batch.style)
