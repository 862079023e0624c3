"""The plain-torch routes called directly, their workspace, and the planner that chooses between them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sketch_cases import expected_linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sdi_kernels as sk
from sdi_kernels import HashFamily, TensorSketch, reference, torch_routes, workspace
from sdi_kernels.calls import EmbeddingCall, LinearCall, MatrixCall, ScaledVectorCall, VectorCall

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
SIZES = [(5, 4, 16), (20, 12, 7), (20, 6, 8), (3, 30, 9), (16, 16, 16), (4, 5, 1), (1, 1, 2)]

families = pytest.mark.parametrize("hashing", sk.HASH_FAMILIES)
sizes = pytest.mark.parametrize(("d_out", "d_in", "m"), SIZES)


def integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).float()


Problem = tuple[Callable[[Tensor], None], Tensor]


def problem(route: str, sketch: TensorSketch, rows: int, tokens: int) -> Problem:
    """A route bound to integer inputs (to be called with the buffer), and its twin's result."""
    a, g = integers(rows, tokens, sketch.d_in), integers(rows, tokens, sketch.d_out)
    tables, m = sketch.tables(), sketch.m
    if route == "matrix":
        grads = integers(rows, sketch.d_out, sketch.d_in)
        want = reference.tensor_sketch(grads, sketch)
        return lambda out: torch_routes.matrix(MatrixCall(out, grads, tables, m)), want
    if route == "embedding":
        ids = torch.randint(sketch.d_out, (rows, tokens))
        want = reference.sketch_embedding_grads(ids, a, sketch)
        return lambda out: torch_routes.embedding(EmbeddingCall(out, ids, a, tables, m)), want
    if route == "scaled vector":
        factors, center, scale = integers(*g.shape), integers(rows, tokens), integers(rows, tokens)
        product = g * (factors - center[..., None]) * scale[..., None]
        want = reference.sketch_vector_grads(product, sketch.out)
        scaled = ScaledVectorCall(torch.empty(0), g, factors, center, scale, tables[:3], m)
        return lambda out: torch_routes.scaled_vector(scaled._replace(out=out)), want
    if route == "vector":
        want = reference.sketch_vector_grads(g, sketch.out)
        return lambda out: torch_routes.vector(VectorCall(out, g, tables[:3], m)), want
    run = torch_routes.linear_fft if route == "fft" else torch_routes.linear_direct
    return lambda out: run(LinearCall(out, a, g, tables, m, route)), reference.sketch_linear_grads(a, g, sketch)


def assert_added(route: str, out: Tensor, before: Tensor, want: Tensor) -> None:
    """Exact, but for the Fourier transform, whose rounding is far below the integers' spacing."""
    torch.testing.assert_close(out.double(), before + want, rtol=0, atol=2e-3 if route == "fft" else 0)


ROUTES = ("direct", "fft", "matrix", "embedding", "vector", "scaled vector")
routes = pytest.mark.parametrize("route", ROUTES)


@routes
@families
@sizes
def test_routes_add_to_the_buffer(route: str, hashing: HashFamily, d_out: int, d_in: int, m: int) -> None:
    run, want = problem(route, TensorSketch(d_out, d_in, m, hashing=hashing), rows=3, tokens=5)
    wide = integers(3, m + 2)
    out, before = wide[:, 1:-1], wide.clone()
    run(out)
    assert_added(route, out, before[:, 1:-1], want)
    assert torch.equal(wide[:, [0, -1]], before[:, [0, -1]])


@routes
@families
@sizes
@pytest.mark.parametrize("budget", [1, 600])
def test_chunking_changes_nothing(
    route: str, hashing: HashFamily, d_out: int, d_in: int, m: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to one token, one row of the matrix at a time."""
    monkeypatch.setitem(workspace.WORKSPACE_BYTES, "cpu", budget)
    run, want = problem(route, TensorSketch(d_out, d_in, m, hashing=hashing), rows=3, tokens=7)
    out = integers(3, m)
    before = out.clone()
    run(out)
    assert_added(route, out, before, want)


@routes
def test_autocast_does_not_lower_the_precision(route: str) -> None:
    """Backward passes are meant to run outside of autocast, but they do run inside."""
    run, want = problem(route, TensorSketch(20, 12, 32), rows=3, tokens=300)
    out = torch.zeros(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        run(out)
    assert_added(route, out, torch.zeros_like(out), want)


class PeakMemory(TorchDispatchMode):
    """The largest sum of tensors alive at a time among those that operators made inside this context."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages = {t.untyped_storage()._cdata for t in known}

    def _release(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        return result


def test_peak_memory_counts() -> None:
    """The instrument of the next test: sees temporaries, and sees them go."""
    x = torch.zeros(1000)
    with PeakMemory(x) as memory:
        for _ in range(3):
            (x + 1)[:10].mul_(2)
        y = x * 2
        z = y + y
    assert memory.peak == 8000
    del y, z
    assert memory.live == 0


@routes
@families
@pytest.mark.parametrize(
    ("d_out", "d_in", "rows", "tokens"),
    [
        (30, 20, 400, 2),  # many examples
        (30, 20, 2, 2000),  # long ones
        (500, 400, 2, 3),  # a large layer: one example's gradient is beyond the limit
        (4000, 10, 1, 3),  # a vocabulary
        (10, 4000, 1, 30),  # and its transpose, as of an unembedding
    ],
    ids=str,
)
def test_workspace_is_bounded(
    route: str, hashing: HashFamily, d_out: int, d_in: int, rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporaries stay under workspace.WORKSPACE_BYTES, whichever dimension is the large one."""
    limit, m = 1 << 18, 128
    monkeypatch.setitem(workspace.WORKSPACE_BYTES, "cpu", limit)
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
    tables = sketch.tables()
    a, g = torch.randn(rows, tokens, d_in).bfloat16(), torch.randn(rows, tokens, d_out).bfloat16()
    ids, out = torch.randint(d_out, (rows, tokens)), torch.zeros(rows, m)
    grads = torch.randn(1, d_out, d_in).bfloat16().expand(rows, -1, -1)
    statistic = torch.randn(rows, tokens)
    with PeakMemory(a, g, ids, out, grads, statistic, *tables) as memory:
        if route == "matrix":
            torch_routes.matrix(MatrixCall(out, grads, tables, m))
        elif route == "embedding":
            torch_routes.embedding(EmbeddingCall(out, ids, a, tables, m))
        elif route == "vector":
            torch_routes.vector(VectorCall(out, g, tables[:3], m))
        elif route == "scaled vector":
            torch_routes.scaled_vector(ScaledVectorCall(out, g, g, statistic, statistic, tables[:3], m))
        else:
            run = torch_routes.linear_fft if route == "fft" else torch_routes.linear_direct
            run(LinearCall(out, a, g, tables, m, route))
    assert memory.peak <= limit, f"{memory.peak / limit:.2f} times the limit"
    assert memory.peak > 0


@families
@sizes
def test_adjoint(hashing: HashFamily, d_out: int, d_in: int, m: int) -> None:
    """<TS(G), v> = <G, TS*(v)> for every G and v, which is what gradients through a sketch are."""
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
    grads, v = integers(4, d_out, d_in), integers(4, m)
    left = (reference.tensor_sketch(grads, sketch) * v).sum(-1)
    right = (grads * torch_routes.linear_adjoint(v, sketch.tables(), m)).sum((-1, -2))
    assert torch.equal(left, right.double())


# ---------------------------------------------------------------------------------------------------------------
# The choice of a route


@families
@sizes
def test_routes_agree(hashing: HashFamily, d_out: int, d_in: int, m: int) -> None:
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
    a, g = torch.randn(2, 3, 30, d_in), torch.randn(2, 3, 30, d_out)
    direct, fft, auto = (sk.sketch_linear_grads(a, g, sketch, route=r) for r in ("direct", "fft", "auto"))
    expected = expected_linear(a, g, sketch)
    expected.check(direct, "direct:")
    expected.check(fft, "fft:")
    chosen = sk.plan_linear(6, 30, sketch, CPU).route
    assert torch.equal(auto, direct if chosen == "direct" else fft)


def test_plan_takes_the_cheaper_route() -> None:
    for device in (CPU, torch.device("cuda")):
        for d in (16, 256, 4096):
            sketch = TensorSketch(d, d, 2048)
            for rows, tokens in ((1, 1), (32, 128), (4, 4096)):
                made = sk.plan_linear(rows, tokens, sketch, device)
                # Shear is priced where it could be forced; only sketches of its own family take it by themselves.
                assert made.route == min(("direct", "fft"), key=made.seconds.__getitem__)
                assert not made.forced
                assert {"direct", "fft"} <= set(made.seconds) <= {"direct", "fft", "shear"}
                assert all(0 < s < math.inf for s in made.seconds.values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_knows_where_each_route_wins(device: str) -> None:
    """Small layers and long runs of tokens: direct; large layers: fft (DESIGN: a factor of three and more apart)."""
    small = sk.plan_linear(32, 512, TensorSketch(64, 64, 2048), torch.device(device))
    large = sk.plan_linear(8, 8, TensorSketch(8192, 2048, 2048), torch.device(device))
    assert small.route == "direct"
    assert large.route == "fft"
    assert small.seconds["fft"] > 2 * small.seconds["direct"]
    assert large.seconds["direct"] > 2 * large.seconds["fft"]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_plan_costs_grow_with_the_work(device: str) -> None:
    sketch, larger = TensorSketch(96, 96, 512), TensorSketch(192, 192, 512)
    base, *more = (
        sk.plan_linear(rows, tokens, s, torch.device(device)).seconds
        for rows, tokens, s in ((8, 64, sketch), (16, 64, sketch), (8, 128, sketch), (8, 64, larger))
    )
    for seconds in more:
        assert seconds["direct"] > base["direct"]
    for seconds in more[:2]:
        assert seconds["fft"] > base["fft"]


@pytest.mark.parametrize("m", [1, 2, 7, 64])
@pytest.mark.parametrize(("rows", "tokens"), [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_plan_for_nothing(m: int, rows: int, tokens: int) -> None:
    assert sk.plan_linear(rows, tokens, TensorSketch(3, 2, m), CPU).route in ("direct", "fft")


@pytest.mark.parametrize("route", ["direct", "fft"])
def test_plan_can_be_overridden(route: sk.Route) -> None:
    made = sk.plan_linear(32, 512, TensorSketch(64, 64, 2048), CPU, route)
    assert made.route == route
    assert made.forced
    assert made.explain().startswith(f"{route} (asked for by route=; estimates: direct ")


def test_plan_explains_itself() -> None:
    text = sk.LinearPlan("fft", {"direct": 0.0123, "fft": 4.56e-5}, forced=False).explain()
    assert text == "fft (estimated cheapest; estimates: direct 12.3 ms, fft 0.0456 ms)"


def test_plan_refuses_an_unknown_route() -> None:
    with pytest.raises(ValueError, match=r"^route: got 'triton'; use one of 'auto', 'direct', 'fft', 'shear'$"):
        sk.plan_linear(1, 1, TensorSketch(2, 2, 2), CPU, "triton")  # type: ignore[arg-type]


def test_workspace_limit_per_device() -> None:
    assert workspace.workspace_bytes(CPU) == workspace.WORKSPACE_BYTES["cpu"]
    for accelerator in ("cuda", "mps", "xpu"):
        assert workspace.workspace_bytes(torch.device(accelerator)) == workspace.WORKSPACE_BYTES["cuda"]
