"""From a spec to a model, its loader, its loss and the modules of its body."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.fuzz.layouts import fold, parts, reorder, streams, subset, unpad
from bench.fuzz.leaves import TOKENWISE, VOCABULARY
from bench.fuzz.loops import LOOPS
from bench.fuzz.routing import Route, over_depth
from bench.fuzz.sequences import SEQUENTIAL
from bench.fuzz.spec import Batch, Node, Spec, walk

AROUND: dict[str, Any] = {
    "fold": fold, "unpad": unpad, "reorder": reorder, "parts": parts, "streams": streams, "depth": over_depth,
    "subset": subset,
}  # fmt: skip
CLASSES: dict[str, Any] = {**TOKENWISE, **SEQUENTIAL, "route": Route}


class Around(nn.Module):
    """A layout around other operations."""

    def __init__(self, d: int, heads: int, node: Node) -> None:
        super().__init__()
        self.node, self.inner = node, Sequence(d, heads, node["inner"])

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return AROUND[self.node["op"]](x, ids, self.inner, self.node)  # type: ignore[no-any-return]


class Sequence(nn.Module):
    """Operations one after the other: ``(x, ids) -> like x``."""

    def __init__(self, d: int, heads: int, nodes: list[Node]) -> None:
        super().__init__()
        self.ops = nn.ModuleList(
            [(Around if "inner" in node else CLASSES[node["op"]])(d, heads, node) for node in nodes]
        )

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for op in self.ops:
            x = op(x, ids)
        return x


class Model(nn.Module):
    """Embedding, loop over the body, readout."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        d = spec.d
        self.steps, self.residual, self.readout = spec.steps, spec.residual, spec.readout
        self.embed = nn.Embedding(VOCABULARY, d)
        half = (len(spec.body) + 1) // 2
        split = [spec.body[:half], spec.body[half:]] if spec.attach == "halves" else [spec.body]
        self.blocks = nn.ModuleList([Sequence(d, spec.heads, nodes) for nodes in split if nodes])
        self.head = nn.Linear(d, VOCABULARY)
        self.loop = LOOPS[spec.loop]
        self.recompute = True
        """Whether activation checkpointing is done where the loop has it."""
        self.running = spec.running
        if spec.running:
            self.register_buffer("mean", torch.zeros(d))
            self.mean: Tensor

    def step(self, h: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        y = h + x if self.residual == "inject" else h
        for block in self.blocks:
            y = block(y, ids)
        return (h + y) / 2 if self.residual == "add" else y

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.running:
            x = x - self.mean
        h = self.loop(self, x, ids)
        if self.running and self.training:
            self.mean = 0.5 * self.mean + 0.5 * h.detach().mean((0, 1))
        return self.head(h.mean(1) if self.readout == "mean" else h)  # type: ignore[no-any-return]


def loss_fn(model: Any, ids: Tensor) -> Tensor:
    """``(B,)``: cross-entropy of the token numbers, padding left out; or of the first token's, from the mean."""
    scores = model(ids)
    if scores.dim() == 2:
        return F.cross_entropy(scores, ids[:, 0], reduction="none")
    losses = F.cross_entropy(scores.transpose(1, 2), ids, reduction="none")
    return (losses * (ids > 0)).sum(1)


def build(spec: Spec) -> tuple[Model, list[nn.Module], list[Tensor]]:
    """The model in float64, its body modules, and its batches of token numbers ``(B, T)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = Model(spec).double().train(spec.training)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.6)
    return model, body_of(model, spec), [tokens(batch, experts(spec)) for batch in spec.batches]


def body_of(model: Model, spec: Spec) -> list[nn.Module]:
    if spec.attach != "inner":
        return list(model.blocks)
    found: list[nn.Module] = []

    def collect(sequence: Any) -> None:
        for op in sequence.ops:
            if isinstance(op, Around):
                # There a module is entered once per example, or not at all: steps would depend on the batch.
                if op.node["op"] not in ("parts", "subset"):
                    collect(op.inner)
            elif any(True for _ in op.parameters()):
                found.append(op)

    collect(model.blocks[0])
    return found or list(model.blocks)


def experts(spec: Spec) -> int:
    """Number of experts of the first routed operation (2 if there is none)."""
    return next((node["experts"] for node in walk(spec.body) if node["op"] == "route"), 2)


def tokens(batch: Batch, experts: int) -> Tensor:
    """``(B, width)`` token numbers from 1 on, zeros from an example's length on."""
    generator = torch.Generator().manual_seed(batch.seed)
    shape = (len(batch.lengths), batch.width)
    ids = torch.randint(1, VOCABULARY, shape, generator=generator)
    if batch.style == "first":  # numbers divisible by ``experts`` go to expert 0: the first B tokens, no others
        mark = torch.arange(ids.numel()).view(shape) < shape[0]
        low = ids // experts * experts
        ids = torch.where(mark, low.clamp(min=experts), low.clamp(max=VOCABULARY - experts) + 1)
    lengths = batch.lengths
    if batch.style == "sorted":  # every column, so that every sum is in order, too
        ids, lengths = ids.sort(0).values, sorted(lengths)
    ids[torch.arange(batch.width) >= torch.tensor(lengths)[:, None]] = 0
    return ids
