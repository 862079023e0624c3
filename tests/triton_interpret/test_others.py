"""``vector``, ``embedding`` and ``pairwise`` kernels against the definition: exact on small integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdi_kernels import CountSketch, TensorSketch, reference
from sdi_kernels.calls import EmbeddingCall, VectorCall
from sdi_kernels.triton import common, embedding, pairwise, vector

FAMILIES = ("balanced", "iid")  # tables of "block" look like balanced ones to these kernels


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("hashing", FAMILIES)
@pytest.mark.parametrize("m", [1, 37, 300])
@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 1, 1), (2, 40, 150)])
def test_vector(shape: tuple[int, int, int], m: int, hashing: str, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    sketch = CountSketch(shape[-1], m, hashing=hashing)
    grads, before = small_integers(*shape), small_integers(shape[0], m)
    out = before.clone()
    vector.vector(VectorCall(out, grads, sketch.tables(), m))
    assert torch.equal(out - before, reference.sketch_vector_grads(grads, sketch).float())


@pytest.mark.parametrize("hashing", FAMILIES)
@pytest.mark.parametrize("m", [1, 37, 300])
@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 1, 1), (2, 20, 150)])
def test_embedding(shape: tuple[int, int, int], m: int, hashing: str) -> None:
    rows, tokens, d = shape
    sketch = TensorSketch(11, d, m, hashing=hashing)
    ids = torch.randint(0, 11, (rows, tokens))
    grads, before = small_integers(*shape), small_integers(rows, m)
    out = before.clone()
    embedding.embedding(EmbeddingCall(out, ids, grads, sketch.tables(), m))
    assert torch.equal(out - before, reference.sketch_embedding_grads(ids, grads, sketch).float())


def test_embedding_id_outside_the_vocabulary_is_seen() -> None:
    sketch = TensorSketch(11, 8, 16)
    for bad in (-1, 11, 2**40):
        ids, out = torch.tensor([[1, 2], [3, bad]]), torch.zeros(2, 16)
        embedding.embedding(EmbeddingCall(out, ids, torch.ones(2, 2, 8), sketch.tables(), 16))
        assert torch.isfinite(out[0]).all()
        assert torch.isnan(out[1]).all()


def test_split_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "token_splits", lambda *_: 4)
    grads, ids = small_integers(2, 70, 20), torch.randint(0, 5, (2, 70))
    count, tensor = CountSketch(20, 64), TensorSketch(5, 20, 64)
    out = torch.zeros(2, 64)
    vector.vector(VectorCall(out, grads, count.tables(), 64))
    assert torch.equal(out, reference.sketch_vector_grads(grads, count).float())
    out = torch.zeros(2, 64)
    embedding.embedding(EmbeddingCall(out, ids, grads, tensor.tables(), 64))
    assert torch.equal(out, reference.sketch_embedding_grads(ids, grads, tensor).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_inputs_and_outputs(dtype: torch.dtype) -> None:
    m = 40
    grads = small_integers(2, 30, 12).transpose(1, 2)[:, ::3].to(dtype)
    ids = torch.randint(0, 5, (4, 2)).T
    count, tensor = CountSketch(30, m), TensorSketch(5, 30, m)
    buffer = torch.zeros(2, 3, m + 2)
    vector.vector(VectorCall(buffer[:, 0, 1:-1], grads, count.tables(), m))
    embedding.embedding(EmbeddingCall(buffer[:, 2, :-2], ids, grads, tensor.tables(), m))
    assert torch.equal(buffer[:, 0, 1:-1], reference.sketch_vector_grads(grads, count).float())
    assert torch.equal(buffer[:, 2, :-2], reference.sketch_embedding_grads(ids, grads, tensor).float())
    assert (buffer[:, 1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_add(shape: tuple[int, int]) -> None:
    before = torch.randn(shape[0], 16)
    for run in (
        lambda out: vector.vector(VectorCall(out, torch.randn(*shape, 8), CountSketch(8, 16).tables(), 16)),
        lambda out: embedding.embedding(
            EmbeddingCall(
                out, torch.zeros(shape, dtype=torch.long), torch.randn(*shape, 8), TensorSketch(5, 8, 16).tables(), 16
            )
        ),
    ):
        out = before.clone()
        run(out)
        assert torch.equal(out, before)


def exact_influence(a: Tensor, g: Tensor, qa: Tensor, qg: Tensor) -> Tensor:
    """Straight from the definition: the inner product of the two weight gradients."""
    return (reference.linear_grads(a, g) * reference.linear_grads(qa, qg)).sum((1, 2))


@pytest.mark.parametrize("shape", [(3, 5, 7, 40, 24), (1, 1, 1, 1, 1), (2, 70, 3, 9, 100), (2, 3, 130, 65, 5)])
def test_pairwise(shape: tuple[int, ...]) -> None:
    pairs, tokens, queries, d_out, d_in = shape
    inputs = (
        small_integers(pairs, tokens, d_in), small_integers(pairs, tokens, d_out),
        small_integers(pairs, queries, d_in), small_integers(pairs, queries, d_out),
    )  # fmt: skip
    assert torch.equal(pairwise.pairwise(*inputs), exact_influence(*inputs).float())


def test_pairwise_split_strided_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query tokens in three parts, one query expanded over all pairs, 16-bit beside fp32."""
    monkeypatch.setattr(common, "token_splits", lambda *_: 3)
    a, g = small_integers(3, 10, 5).transpose(1, 2), small_integers(3, 5, 8)[..., ::2]
    qa, qg = small_integers(1, 150, 10).expand(3, -1, -1), small_integers(1, 150, 4).expand(3, -1, -1)
    want = exact_influence(a, g, qa, qg).float()
    assert torch.equal(pairwise.pairwise(a, g, qa, qg), want)
    assert torch.equal(pairwise.pairwise(a.bfloat16(), g, qa.half(), qg), want)
    assert torch.equal(pairwise.pairwise(a.half(), g.half(), qa.half(), qg.half()), want)


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (3, 4, 0)])
def test_pairwise_of_nothing(shape: tuple[int, int, int]) -> None:
    pairs, tokens, queries = shape
    got = pairwise.pairwise(
        torch.randn(pairs, tokens, 3), torch.randn(pairs, tokens, 2),
        torch.randn(pairs, queries, 3), torch.randn(pairs, queries, 2),
    )  # fmt: skip
    assert torch.equal(got, torch.zeros(pairs))
