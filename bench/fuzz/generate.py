"""Draws specs. All random choices go through one ``random.Random``, so hypothesis can make them, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any, TypeVar

from bench.fuzz.layouts import COPIES, FOLDS, MOVES, SEQUENTIAL_FOLDS
from bench.fuzz.leaves import FORMS, VECTORS
from bench.fuzz.sequences import LONGEST
from bench.fuzz.spec import Batch, Node, Spec, walk

T = TypeVar("T")

MODES = ("res", "plain", "gate")
HOWS: dict[str, Sequence[str]] = {
    "linear": tuple(FORMS),
    "norm": ("layer", "rms", "group", "by hand", "addcmul"),
    "vector": tuple(VECTORS),
    "lookup": ("module", "padding", "getitem", "select", "one hot", "scores"),
    "cell": ("gru", "rnn"),
    "buffer": ("decay", "small", "in place", "power", "ema", "spectral_norm"),
    "hook": ("scale", "clamp", "grad", "grad in hook"),
    "attention": ("manual", "sdpa", "causal", "heads in batch", "module", "module, tokens first"),
    "convolution": ("module", "depthwise", "causal", "unfolded", "functional"),
    "positions": ("mix", "prefix", "generated", "channels", "module", "module, expanded", "slice"),
    "recurrent": ("gru", "lstm"),
    "plain": ("mean", "cumsum", "roll", "flip"),
    "mixing": ("mean", "flip", "roll", "attention", "softmax", "maximum", "cumsum"),
    "fold": tuple(FOLDS),
    "unpad": (
        "slices", "backwards", "narrow", "unbind", "index", "index_select", "mask", "packed", "one row",
        "sorted tokens",
    ),
    "reorder": tuple(MOVES),
    "parts": (
        "ragged", "one by one", "integers", "chunk", "split", "tokens one by one", "every other", "buckets",
        "buckets, stack",
    ),
    "streams": ("cat", "interleaved", "stacked", *COPIES),
    "subset": ("mask", "index", "add", "stack"),
    "depth": ("gather", "pairs", "flattened"),
    "route": (
        "index_add", "index_add_", "index_put", "mask", "sorted", "weighted", "stacked", "number as tensor", "unbind",
        "gathered weights", "all", "bmm", "einsum",
    ),
}  # fmt: skip
BACKS = {"unpad": ("pad_sequence", "stack", "mask", "masked_scatter", "rows", "index_copy"), "reorder": tuple(MOVES)}
ORDERS = ("length", "first token", "sum", "flip", "roll")

COMMON: dict[str, Sequence[str]] = {
    "linear": ("module", "module", "functional", "matmul", "t", "qkv"), "norm": ("layer", "rms", "by hand"),
    "vector": ("scale", "bias", "exp"), "lookup": ("module",), "attention": ("manual", "sdpa"),
    "convolution": ("module", "depthwise"), "route": ("index_add", "mask", "stacked"),
    "fold": ("(b w) n d", "(b w) n d", "(w b) n d", "(b w) n d, stack", "(b t) d", "(t b) d"),
}  # fmt: skip
"""Half of all models are made of these only, around one layout: no refusal then hides what the layout does."""

TOKENWISE = {"linear": 9, "norm": 3, "vector": 4, "lookup": 2, "cell": 1, "hook": 1, "route": 2}
ALONG = {**TOKENWISE, "attention": 3, "convolution": 2, "positions": 2, "recurrent": 0.4, "plain": 2}
PLAINEST = {"linear": 5, "norm": 1, "vector": 2, "lookup": 0.5}
AROUND = {"fold": 3, "unpad": 2, "reorder": 2, "parts": 1.5, "streams": 1, "depth": 1, "subset": 1}
LOOPS = {
    "plain": 12, "halting": 2, "halting by token": 1, "leaving": 1, "exits": 1, "depth of batch": 1, "truncated": 1,
    "without gradient": 1, "checkpointed": 2, "implicit": 1.5, "implicit anew": 0.7, "two levels": 2,
}  # fmt: skip


def weighted(random: Random, weights: Mapping[str, float]) -> str:
    return random.choices(list(weights), list(weights.values()))[0]


def draw(random: Random, *, without: Sequence[str] = ()) -> Spec:
    """A spec without what is named in ``without``, in words of :meth:`Spec.features` or :meth:`Spec.kinds`."""
    while True:
        spec = _draw(random)
        if not spec.features() & set(without) and not set(spec.kinds()) & set(without):
            return spec


def _draw(random: Random) -> Spec:
    heads = random.choice((1, 2, 2))
    d = random.choice((2, 4, 4, 6))
    training = random.random() < 0.2
    mixes = random.random() < 0.06
    attach = "whole" if mixes else random.choice(("whole", "whole", "halves", "inner"))
    common = random.random() < 0.5
    body = common_body(random) if common else [node_along(random, 0) for _ in range(random.choice((1, 2, 2, 3)))]
    if training and random.random() < 0.6:
        body.insert(random.randrange(len(body) + 1), leaf(random, "buffer"))
    if not any(has_parameters(node) for node in walk(body)):
        body.insert(0, leaf(random, "linear"))
    if mixes:
        # After an operation with parameters, whose gradients then show that examples meet.
        body += [leaf(random, "linear"), leaf(random, "mixing")]
        if training and random.random() < 0.3:
            body[-1]["how"] = "batch norm"
    loop = "plain" if mixes or (common and random.random() < 0.5) else weighted(random, LOOPS)
    running = training and not mixes and random.random() < 0.2
    if loop in ("checkpointed", "implicit anew") and any(node["op"] == "buffer" for node in walk(body)):
        # What runs again in the backward pass would move buffers once more: then no value is the right one.
        loop = "plain"
    return Spec(
        seed=random.randrange(1 << 20),
        d=d,
        heads=heads,
        steps=2 if mixes else random.choice((1, 2, 2, 3)),
        body=body,
        batches=draw_batches(random, body, d),
        loop=loop,
        residual=random.choice(("none", "add", "inject")),
        attach=attach,
        readout=random.choice(("tokens", "tokens", "mean")),
        running=running,
        training=training,
        mixes=mixes,
        summed=not mixes and random.random() < 0.15,
    )


def has_parameters(node: Node) -> bool:
    return "inner" not in node and node["op"] not in ("plain", "mixing")


def common_body(random: Random) -> list[Node]:
    """One layout around one or two common operations, another beside it."""
    if random.random() < 0.25:
        middle = leaf(random, "route", common=True)
    else:
        middle = around(random, 2, common=True)
        middle["inner"] = [leaf(random, weighted(random, PLAINEST), common=True) for _ in range(random.choice((1, 2)))]
    beside = leaf(random, random.choice(("linear", "norm", "attention", "convolution")), common=True)
    return random.choice(([middle], [beside, middle], [middle, leaf(random, "plain")]))


def leaf(random: Random, op: str, *, common: bool = False) -> Node:
    node: dict[str, Any] = {"op": op, "how": random.choice(COMMON[op] if common else HOWS[op])}
    if op in ("linear", "vector", "lookup", "buffer", "convolution", "positions"):
        node["mode"] = random.choice(MODES)
    if op == "linear" and node["how"] == "module":
        node["bias"] = random.random() < 0.7
    if op == "route":
        node |= {
            "experts": random.choice((2, 2, 3)),
            "by": random.choice(("ids", "ids", "gate", "two")),
            "skip": random.random() < 0.5,
        }
    return node


def node_along(random: Random, depth: int) -> Node:
    """An operation on ``(rows, tokens, d)`` in which a row's tokens are of one example."""
    if depth < 2 and random.random() < (0.4 if depth == 0 else 0.2):
        return around(random, depth)
    return leaf(random, weighted(random, ALONG))


def around(random: Random, depth: int, *, common: bool = False) -> Node:
    op = weighted(random, AROUND)
    how = random.choice(COMMON.get(op, HOWS[op]) if common else HOWS[op])
    node: Node = {"op": op, "how": how}
    if op == "fold":
        node["n"] = random.choice((1, 2, 2, 3, 4))
    if op in BACKS:
        node["back"] = random.choice(BACKS[op])
    if op == "reorder":
        node["order"] = random.choice(ORDERS)
    along = op in ("parts", "depth", "reorder", "subset") or (op == "fold" and how in SEQUENTIAL_FOLDS)
    along |= op == "streams" and how != "stacked"
    count = random.choice((1, 1, 2))
    node["inner"] = [
        node_along(random, depth + 1) if along else leaf(random, weighted(random, TOKENWISE)) for _ in range(count)
    ]
    return node


def draw_batches(random: Random, body: list[Node], d: int) -> list[Batch]:
    """Two to four batches."""
    shapes = draw_shapes(random, body, d)
    batches: list[Batch] = []
    for k in range(random.choice((2, 3, 3, 4))):
        size, width = next(shapes)
        # The first batch is often one in which a wrong decision shows nothing.
        benign = random.random() < (0.6 if k == 0 else 0.1)
        style = random.choice(("random", "sorted", "sorted", "first")) if benign else "random"
        if not benign and random.random() < 0.25:
            style = "first"
        batches.append(Batch(draw_lengths(random, size, width, benign), width, random.randrange(1 << 20), style))
    return batches


def draw_shapes(random: Random, body: list[Node], d: int) -> Iterator[tuple[int, int]]:
    """Shapes ``(B, T)`` of batches. They come from a few small numbers, so that different ones often are equal."""
    small, widths = (1, 2, 3, 4), (2, 3, 4, 6)
    windows = [node["n"] for node in walk(body) if node["op"] == "fold" and node["n"] > 1]
    change = random.choice(("nothing", "nothing", "all", "all but tokens", *["all but windows"] * 3 * len(windows)))
    shape = random.choice(small), random.choice(widths)
    # Batches of the same number of tokens, as token-budget batching makes them.
    total = shape[0] * shape[1]
    fitting = [(b, total // b) for b in (1, 2, 3, 4, 6, 8) if total % b == 0 and 2 <= total // b <= LONGEST]
    if change == "all but windows":
        n, count = windows[0], random.choice((4, 6, 8, 12))
        fitting = [(b, n * count // b) for b in range(1, 9) if count % b == 0 and n * count // b <= LONGEST]
        # As many examples as a window has tokens: the dimension of these seems to hold the examples.
        fitting += [pair for pair in fitting if pair[0] == n] * 2
        shape = random.choice(fitting)
    while True:
        yield shape
        if change == "all":
            shape = random.choice((*small, d)), random.choice((*widths, d))
        elif change != "nothing" and fitting:
            shape = random.choice(fitting)


def draw_lengths(random: Random, size: int, width: int, benign: bool) -> list[int]:
    """Equal lengths, or lengths whose sum is that of equal ones, or any."""
    equal = random.choice((width, (width + 1) // 2))
    lengths = [equal] * size
    if benign:
        return lengths
    if random.random() < 0.5:
        return [random.randint(1, width) for _ in range(size)]
    for _ in range(size):
        i, j = random.randrange(size), random.randrange(size)
        if i != j and lengths[i] > 1 and lengths[j] < width:
            lengths[i] -= 1
            lengths[j] += 1
    return lengths
