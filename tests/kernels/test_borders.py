"""Operators called directly: what does not belong together is refused before a kernel reads memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdi_kernels import CountSketch, TensorSketch, borders, ops, reference, sketch_linear_grads
from sdi_kernels.calls import LinearCall

Arguments = dict[str, Any]
OPERATORS = {
    "linear": ops.linear_sketch_,
    "matrix": ops.matrix_sketch_,
    "embedding": ops.embedding_sketch_,
    "vector": ops.vector_sketch_,
    "scaled_vector": ops.scaled_vector_sketch_,
}


def arguments(name: str, rows: int, tokens: int, d_out: int, d_in: int, m: int) -> Arguments:
    """A call that is right, with tables of its own."""
    tensor = TensorSketch(d_out, d_in, m, hashing="iid")
    acts, grads = torch.randn(rows, tokens, d_in), torch.randn(rows, tokens, d_out)
    tables, out = [t.clone() for t in tensor.tables()], torch.zeros(rows, m)
    per_token = torch.randn(rows, tokens)
    if name == "linear":
        return {
            "out": out,
            "activations": acts,
            "grad_outputs": grads,
            "tables": tables,
            "m": m,
            "route": "direct",
            "metric": torch.rand(d_out, d_in),
        }
    if name == "matrix":
        return {
            "out": out,
            "grads": torch.randn(rows, d_out, d_in),
            "tables": tables,
            "m": m,
            "metric": torch.rand(d_out, d_in),
        }
    if name == "embedding":
        ids = torch.randint(d_out, (rows, tokens))
        return {"out": out, "token_ids": ids, "grad_outputs": acts, "tables": tables, "m": m}
    if name == "vector":
        return {"out": out, "grads": acts, "tables": tables[3:], "m": m}
    return {
        "out": out,
        "grads": acts,
        "factors": torch.randn(rows, tokens, d_in),
        "center": per_token,
        "scale": per_token,
        "tables": tables[3:],
        "m": m,
    }


def with_table(call: Arguments, number: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
    number = number % len(call["tables"])
    tables = list(call["tables"])
    tables[number] = change(tables[number])
    return {**call, "tables": tables}


def with_entry(call: Arguments, number: int, value: int) -> Arguments:
    def change(table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        table.view(-1)[-1] = value
        return table

    return with_table(call, number, change)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arguments, int], Arguments]:
    """One tensor argument changed; of several called so in different operators, the one that is there."""
    return lambda call, _: {**call, name: change(call[name])} if name in call else {**call, "m": 0}


def within_an_input(call: Arguments) -> Arguments:
    """``out`` and the first gradients in one piece of memory."""
    name = "grads" if "grads" in call else "grad_outputs"
    value, out = call[name], call["out"]
    memory = torch.zeros(value.numel() + out.numel())
    return {**call, name: memory[: value.numel()].view_as(value), "out": memory[: out.numel()].view_as(out)}


WRONG: dict[str, Callable[[Arguments, int], Arguments]] = {
    "a table missing": lambda call, _: {**call, "tables": call["tables"][:-1]},
    "no tables": lambda call, _: {**call, "tables": []},
    "a table in int64": lambda call, k: with_table(call, k, torch.Tensor.long),
    "a short table": lambda call, k: with_table(call, k, lambda t: t[:-1]),
    "a long table": lambda call, k: with_table(call, k, lambda t: torch.cat([t, t])),
    "a table with gaps": lambda call, k: with_table(call, k, lambda t: torch.stack([t, t], -1)[..., 0]),
    "a bucket below": lambda call, k: with_entry(call, 3 * k, -1),
    "a bucket beyond": lambda call, k: with_entry(call, 3 * k, call["m"]),
    "a bucket far beyond": lambda call, k: with_entry(call, 3 * k, 2**30),
    "a sign of zero": lambda call, k: with_entry(call, 3 * k + 1, 0),
    "a source beyond": lambda call, k: with_entry(call, 3 * k + 2, 10**6),
    "another m": lambda call, _: {**call, "m": call["m"] + 1},
    "a negative m": lambda call, _: {**call, "m": -1},
    "out with a row less": replaced("out", lambda t: t[:-1]),
    "out narrower": replaced("out", lambda t: t[:, :-1]),
    "out of one dimension": replaced("out", lambda t: t[0]),
    "out in float64": replaced("out", torch.Tensor.double),
    "out in bfloat16": replaced("out", torch.Tensor.bfloat16),
    "out that shares memory": replaced("out", lambda t: t[:1, :1].expand(max(2, len(t)), t.shape[1])),
    "out whose rows overlap": replaced(
        "out", lambda t: t.new_zeros(t.numel() + 2).as_strided((max(2, len(t)), max(2, t.shape[1])), (1, 1))
    ),
    "out within an input": lambda call, _: within_an_input(call),
    "out on meta": replaced("out", lambda t: t.to("meta")),
    "gradients on meta": replaced("grads", lambda t: t.to("meta")),
    "a scale of booleans": replaced("scale", torch.Tensor.bool),
    "wider activations": replaced("activations", lambda t: torch.cat([t, t], -1)),
    "activations of integers": replaced("activations", torch.Tensor.int),
    "a token less of activations": replaced("activations", lambda t: t[:, :-1]),
    "wider gradients": replaced("grads", lambda t: torch.cat([t, t], -1)),
    "gradients of one dimension less": replaced("grads", lambda t: t[0]),
    "complex gradients": replaced("grads", lambda t: t.to(torch.complex64)),
    "narrower output gradients": replaced("grad_outputs", lambda t: t[..., :-1]),
    "a row more of output gradients": replaced("grad_outputs", lambda t: torch.cat([t, t[:1]])),
    "ids in int32": replaced("token_ids", torch.Tensor.int),
    "a token less of ids": replaced("token_ids", lambda t: t[:, :-1]),
    "an id beyond": replaced("token_ids", lambda t: t + 10**9),
    "a negative id": replaced("token_ids", lambda t: t - 10**9),
    "a metric the other way round": replaced("metric", lambda t: torch.cat([t, t]).T),
    "a metric of integers": replaced("metric", torch.Tensor.int),
    "a route that is not there": replaced("route", lambda _: "dense"),
    "a route that takes no metric": replaced("route", lambda _: "fft"),
    "factors of another width": replaced("factors", lambda t: t[..., :-1]),
    "one center for all tokens": replaced("center", lambda t: t[:, :1].expand(-1, t.shape[1] + 1)),
    "a scale of one row less": replaced("scale", lambda t: t[:-1]),
}

sizes = st.tuples(*(st.integers(1, n) for n in (4, 5, 40, 40, 64)))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(OPERATORS)), sizes, st.sampled_from(sorted(WRONG)), st.integers(0, 5), st.booleans())
def test_wrong_calls_are_refused(
    name: str, size: tuple[int, int, int, int, int], wrong: str, number: int, seen_before: bool
) -> None:
    call = arguments(name, *size)
    if seen_before:  # tables that were found right do not cover others
        OPERATORS[name](*call.values())
    bad = WRONG[wrong](call, number)
    if wrong == "a table with gaps" and bad["tables"][number % len(bad["tables"])].is_contiguous():
        return  # of one entry: there is no gap
    with pytest.raises((ValueError, TypeError, IndexError)):
        OPERATORS[name](*bad.values())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(OPERATORS)), sizes, st.sampled_from(["dense", "strided", "16 bits"]))
def test_right_calls_are_taken(name: str, size: tuple[int, int, int, int, int], layout: str) -> None:
    call = arguments(name, *size)
    want = torch.zeros_like(call["out"])
    OPERATORS[name](*{**call, "out": want}.values())
    if layout == "16 bits":
        call = {
            k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() and k != "out" else v
            for k, v in call.items()
        }
        want = torch.full_like(want, float("nan"))
    elif layout == "strided":
        call = {k: torch.stack([v, v], -1)[..., 0] if torch.is_tensor(v) else v for k, v in call.items()}
    OPERATORS[name](*call.values())
    assert torch.isfinite(call["out"]).all()
    if layout != "16 bits":
        torch.testing.assert_close(call["out"], want, rtol=1e-4, atol=1e-4)


def test_public_functions_refuse_shared_memory() -> None:
    sketch = TensorSketch(4, 6, 8)
    a, g, memory = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 4), torch.zeros(400)
    shared = memory[: a.numel()].view_as(a)
    for out in (torch.zeros(1, 3, 8).expand(2, 3, 8), memory.as_strided((2, 3, 8), (3, 1, 1))):
        with pytest.raises(ValueError, match="out: its entries share memory"):
            sketch_linear_grads(a, g, sketch, out=out)
    for out in (memory[:48].view(2, 3, 8), memory[:48].view(3, 2, 8).transpose(0, 1)):
        with pytest.raises(ValueError, match="out: shares memory with an input"):
            sketch_linear_grads(shared, g, sketch, out=out)
    nothing = torch.zeros(0, 3, 20)[..., 5:13].transpose(0, 1)  # has no entries that could share any
    sketch_linear_grads(a[:0].transpose(0, 1), g[:0].transpose(0, 1), sketch, out=nothing)
    beside = torch.zeros(2, 3, 20)
    sketch_linear_grads(a, g, sketch, out=beside[..., 5:13])  # a part of a larger buffer is what it is for


def test_another_device_is_refused() -> None:
    call = arguments("linear", 2, 3, 6, 8, 16)
    for name in ("activations", "grad_outputs", "metric"):
        with pytest.raises(ValueError, match=f"{name}: got shape .* on meta"):
            borders.linear(LinearCall(**{**call, name: call[name].to("meta")}))
    with pytest.raises(ValueError, match=r"tables: the gather of outputs .* on meta"):
        borders.linear(LinearCall(**with_table(call, 2, lambda t: t.to("meta"))))


def test_tables_written_to_are_looked_at_again() -> None:
    sketch = CountSketch(8, 16)
    tables, grads = [t.clone() for t in sketch.tables()], torch.ones(1, 2, 8)
    for _ in range(2):
        ops.vector_sketch_(torch.zeros(1, 16), grads, tables, 16)
    tables[0][3] = 16
    with pytest.raises(ValueError, match=r"tables: those of the vector .* buckets must lie in \[0, 16\)"):
        ops.vector_sketch_(torch.zeros(1, 16), grads, tables, 16)


def test_values_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = borders.inverse_table
    monkeypatch.setattr(borders, "inverse_table", lambda *a: looked.append(1) or real(*a))
    sketch = TensorSketch(6, 8, 16)
    own, copies = sketch.tables(), [t.clone() for t in sketch.tables()]
    a, g = torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    for tables, times in ((own, 0), (copies, 2)):  # a sketch's own are known; of others, each side once
        looked.clear()
        for _ in range(3):
            ops.linear_sketch_(torch.zeros(2, 16), a, g, tables, 16, "direct")
        assert len(looked) == times


def test_tables_are_forgotten_with_their_sketch() -> None:
    before = len(borders._known)
    sketch = CountSketch(8, 16)
    assert len(borders._known) == before + 1
    del sketch
    assert len(borders._known) == before


def test_inference_tensors_are_taken_and_looked_at() -> None:
    with torch.inference_mode():
        tables = [t.clone() for t in CountSketch(8, 16).tables()]
        out = torch.zeros(1, 16)
        ops.vector_sketch_(out, torch.ones(1, 2, 8), tables, 16)
        tables[0][0] = -5
        with pytest.raises(ValueError, match="tables: those of the vector"):
            ops.vector_sketch_(out, torch.ones(1, 2, 8), tables, 16)


def test_shear_needs_inputs_in_order() -> None:
    """On a GPU its kernel would not look at where they are hashed to."""
    a, g = torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    sketch, mixed = TensorSketch(6, 8, 16, hashing="block"), TensorSketch(6, 8, 16, hashing="iid")
    out = torch.zeros(2, 16)
    ops.linear_sketch_(out, a, g, sketch.tables(), 16, "shear")
    torch.testing.assert_close(out.double(), reference.sketch_linear_grads(a, g, sketch), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="route: 'shear'"):
        ops.linear_sketch_(out, a, g, mixed.tables(), 16, "shear")


def test_pairs_that_do_not_fit_are_refused() -> None:
    a, g = torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    with pytest.raises(ValueError, match="query_activations, query_grad_outputs"):
        torch.ops.sdi_kernels.pairwise_linear_influence(a, g, a[..., :-1], g)
