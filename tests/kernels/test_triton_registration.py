"""How the CUDA kernels hang on the operators: lazily, with a torch fallback, and without limits of 32 bits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from sketch_cases import expected_embedding, expected_linear, expected_matrix, expected_vector
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sdi_kernels as sk
from sdi_kernels import CountSketch, TensorSketch, ops, pairwise, reference, torch_routes, triton
from sdi_kernels.calls import EmbeddingCall, LinearCall, MatrixCall, ScaledVectorCall, VectorCall
from sdi_kernels.triton import cost, launch

ACCUMULATING = [
    "linear_sketch_",
    "linear_steps_sketch_",
    "matrix_sketch_",
    "embedding_sketch_",
    "vector_sketch_",
    "scaled_vector_sketch_",
]


def test_importing_everything_imports_no_triton() -> None:
    code = (
        "import sys, sdi_kernels, sdi_kernels.triton.launch, sdi_kernels.pairwise; "
        "assert 'triton' not in sys.modules; import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [*ACCUMULATING, "pairwise_linear_influence"])
def test_operator_has_a_cuda_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sdi_kernels::{name}", "CUDA")


def test_without_triton_the_torch_routes_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "available", lambda: False)
    m, a, g = 256, torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    sketch, count = TensorSketch(6, 8, m), CountSketch(8, m)
    ids = torch.randint(0, 6, (2, 3))
    for route in ("fft", "direct"):
        out = torch.zeros(2, m)
        launch.linear_sketch_(LinearCall(out, a, g, sketch.tables(), m, route))
        expected_linear(a, g, sketch).check(out, route)
    out = torch.zeros(2, m)
    launch.embedding_sketch_(EmbeddingCall(out, ids, a, sketch.tables(), m))
    expected_embedding(ids, a, sketch).check(out)
    out = torch.zeros(2, m)
    launch.vector_sketch_(VectorCall(out, a, count.tables(), m))
    expected_vector(a, count).check(out)
    matrices, metric = torch.randn(2, 6, 8), torch.rand(6, 8)
    out = torch.zeros(2, m)
    launch.matrix_sketch_(MatrixCall(out, matrices, sketch.tables(), m, metric))
    expected_matrix(matrices, sketch, metric=metric).check(out)
    out, center = torch.zeros(2, m), torch.randn(2, 3)
    launch.scaled_vector_sketch_(ScaledVectorCall(out, a, a, center, None, count.tables(), m))
    expected_vector(a, count, factors=a, center=center).check(out)


def test_float64_goes_to_the_torch_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("linear_fft", "linear_direct", "embedding", "vector", "matrix", "scaled_vector"):
        monkeypatch.setattr(torch_routes, name, lambda *_, tag=name: ran.append(tag))
    a = torch.zeros(1, 1, 3, dtype=torch.float64)
    launch.linear_sketch_(LinearCall(torch.zeros(1, 256), a, a, [], 256, "fft"))
    launch.linear_sketch_(LinearCall(torch.zeros(1, 256), a, a, [], 256, "direct"))
    launch.embedding_sketch_(EmbeddingCall(torch.zeros(1, 256), torch.zeros(1, 1), a, [], 256))
    launch.vector_sketch_(VectorCall(torch.zeros(1, 256), a, [], 256))
    launch.matrix_sketch_(MatrixCall(torch.zeros(1, 256), a, [], 256))
    launch.scaled_vector_sketch_(ScaledVectorCall(torch.zeros(1, 256), a.float(), a, None, None, [], 256))
    assert ran == ["linear_fft", "linear_direct", "embedding", "vector", "matrix", "scaled_vector"]


def test_triton_is_found_where_it_is() -> None:
    triton.available.cache_clear()
    try:
        import triton as _  # noqa: F401
    except ImportError:
        assert not triton.available()
    else:
        assert triton.available()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("route", ["fft", "direct"])
def test_shapes_beyond_32_bits(device: str, route: str) -> None:
    """2**31 elements and one row more, as fake tensors, through the functions that callers use."""
    rows, tokens, d, m = (1 << 21) + 1, 8, 128, 1024
    sketch, count = TensorSketch(d, d, m), CountSketch(d, m)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(rows, tokens, d, device=device)
        assert x.numel() > 2**31
        ids = torch.empty(rows, tokens, dtype=torch.long, device=device)
        matrices, per_token = torch.empty(rows, d, d, device=device), torch.empty(rows, tokens, device=device)
        out = torch.empty(rows, m, device=device)
        assert out.numel() > 2**31
        tables = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in sketch.tables()]
        vector_tables = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in count.tables()]
        got = [
            ops.linear_sketch(x, x, tables, m, route),
            ops.embedding_sketch(ids, x, tables, m),
            ops.vector_sketch(x, vector_tables, m),
            ops.matrix_sketch(matrices, tables, m),
        ]
        assert all(t.shape == (rows, m) and t.dtype == torch.float32 and t.device.type == device for t in got)
        ops.linear_sketch_(out, x, x, tables, m, route)
        ops.matrix_sketch_(out, matrices, tables, m)
        ops.scaled_vector_sketch_(out, x, x, per_token, None, vector_tables, m)
        scores = pairwise._pairwise(x, x, x, x)
        assert scores.shape == (rows,)


def test_planner_on_cuda() -> None:
    """Small layers go ``direct``, large ones ``fft``; a sketch size without a kernel costs the torch route."""
    device = torch.device("cuda")

    def route(d: int, tokens: int, dtype: torch.dtype, m: int = 2048) -> str:
        return sk.plan_linear((1 << 15) // tokens, tokens, TensorSketch(d, d, m), device, dtype=dtype).route

    assert route(128, 128, torch.float32) == route(128, 128, torch.bfloat16) == "direct"
    assert route(4096, 2048, torch.float32) == route(4096, 2048, torch.bfloat16) == "fft"
    assert route(768, 2048, torch.bfloat16) == "direct"  # 16-bit products are fast, and the epilogue is paid once
    assert route(768, 128, torch.float32, m=2048) == "fft"
    assert route(768, 128, torch.float32, m=2047) == "direct"
    # shear only for the family made for it; by these estimates it pays where the epilogue is most of direct's time.
    for hashing, expected in (("balanced", {"direct", "fft"}), ("block", {"direct", "fft", "shear"})):
        sketches = [TensorSketch(d, d, 2048, hashing=hashing) for d in (64, 256, 512, 1024, 1536, 2040)]
        calls = [
            (s, tokens, dtype) for s in sketches for tokens in (1, 32, 2048) for dtype in (torch.float32, torch.half)
        ]
        assert {sk.plan_linear(64, t, s, device, dtype=dtype).route for s, t, dtype in calls} == expected
    assert sk.plan_linear(8, 128, TensorSketch(64, 64, 256), device, "shear").route == "shear"
    assert sk.plan_linear(8, 128, TensorSketch(64, 64, 256), torch.device("cpu"), "shear").route == "direct"
    plan = sk.plan_linear(8, 128, TensorSketch(64, 64, 256), device, "fft")
    assert "asked for by route=" in plan.explain()
    assert set(cost.FFT_CYCLES) == {256, 512, 1024, 2048, 4096, 8192}


# ---------------------------------------------------------------------------------------------------------------
# Exact influence of pairs


def exact_influence(a: Tensor, g: Tensor, qa: Tensor, qg: Tensor) -> Tensor:
    return (reference.linear_grads(a, g) * reference.linear_grads(qa, qg)).sum((1, 2))


def pair_inputs(pairs: int, tokens: int, queries: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (tokens, 6), (tokens, 4), (queries, 6), (queries, 4)
    return [torch.randint(-4, 5, (pairs, *shape)).to(dtype) for shape in shapes]


@pytest.mark.numeric
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (0, 4, 4), (3, 0, 4), (3, 4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pairwise_influence_is_exact_on_integers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = pair_inputs(*shape, dtype=dtype)
    got = sk.pairwise_linear_influence(*inputs)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got.double(), exact_influence(*inputs))


@pytest.mark.numeric
@pytest.mark.parametrize("budget", [1, 300, 2000])
def test_pairwise_influence_in_chunks(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "workspace_bytes", lambda _: budget)
    inputs = pair_inputs(5, 9, 3)
    assert torch.equal(sk.pairwise_linear_influence(*inputs).double(), exact_influence(*inputs))


@pytest.mark.numeric
def test_pairwise_influence_expands_a_query_without_a_copy() -> None:
    a, g, qa, qg = pair_inputs(4, 3, 5)
    qa, qg = qa[:1].expand(4, -1, -1), qg[:1].expand(4, -1, -1)
    assert torch.equal(sk.pairwise_linear_influence(a, g, qa, qg).double(), exact_influence(a, g, qa, qg))


def test_pairwise_influence_passes_opcheck_and_compiles() -> None:
    inputs = pair_inputs(3, 5, 7)
    torch.library.opcheck(pairwise._pairwise, tuple(inputs))
    compiled = torch.compile(sk.pairwise_linear_influence, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), sk.pairwise_linear_influence(*inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, g, qa, qg: (a[0], g, qa, qg), "activations"),
        (lambda a, g, qa, qg: (a, g[:2], qa, qg), r"grad_outputs: got shape \(2, 5, 4\)"),
        (lambda a, g, qa, qg: (a, g[:, :3], qa, qg), "3 and 7 tokens"),
        (lambda a, g, qa, qg: (a, g, qg, qa), "got widths 4 and 6"),
    ],
)
def test_pairwise_influence_names_what_is_wrong(change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(ValueError, match=message):
        sk.pairwise_linear_influence(*change(*pair_inputs(3, 5, 7)))


@pytest.mark.numeric
@pytest.mark.parametrize("route", ["fft", "direct"])
def test_calling_function_compiles_as_one_graph(route: str) -> None:
    sketch = TensorSketch(6, 8, 256)

    def step(a: Tensor, g: Tensor, buffer: Tensor) -> Tensor:
        sk.sketch_linear_grads(a * 2, g, sketch, route=route, out=buffer)
        return buffer + sk.sketch_linear_grads(a, g, sketch, route=route)

    a, g = torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(a, g, torch.zeros(2, 256))
    expected = expected_linear(a, g, sketch)
    expected.check(got / 3)  # 2 a and a, each once
