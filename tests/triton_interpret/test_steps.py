"""All uses of a looped layer by one launch: lists of pairs through a table of addresses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sketch_cases import Uses, uses
from torch import Tensor

from sdi_kernels import TensorSketch, torch_routes
from sdi_kernels.calls import LinearStepsCall
from sdi_kernels.triton import common, direct, fft, launch, shear
from sdi_kernels.triton.uses import work

D_OUT, D_IN = 20, 30
KERNELS: dict[str, tuple[Callable[..., None], int, list[str]]] = {
    "direct": (direct.linear_direct, 64, ["direct_sketch_kernel"]),
    "shear": (shear.linear_shear, 64, ["shear_sketch_kernel"]),
    "fft": (fft.linear_fft, 256, ["fft_sketch_kernel", "fft_finish_kernel"]),
}
"""Launcher, sketch size, and what one call launches."""
kernels = pytest.mark.parametrize("name", KERNELS)
kinds = pytest.mark.parametrize("kind", ["equal", "summed", "ragged"])


def integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


def call_of(made: Uses, out: Tensor, route: str, metric: Tensor | None = None) -> LinearStepsCall:
    tables = sketch_of(route).tables()
    return LinearStepsCall(
        out, made.activations, made.grad_outputs, tables, out.shape[-1], route, made.steps, made.rows, metric
    )


def sketched(name: str, made: Uses, out: Tensor | None = None, metric: Tensor | None = None, **options: Any) -> Tensor:
    run, m, _ = KERNELS[name]
    if out is None:
        out = torch.zeros(*made.size, m)
    run(call_of(made, out, name, metric), **options)
    return out


def sketch_of(name: str, hashing: Any = "balanced") -> TensorSketch:
    return TensorSketch(D_OUT, D_IN, KERNELS[name][1], hashing=hashing)


@pytest.mark.numeric
@kernels
@kinds
def test_every_pair_is_added_to_its_slot(name: str, kind: str, launches: list[str]) -> None:
    """Into a slice of a larger buffer, and with the launches that one step takes."""
    made, m = uses(kind, D_IN, D_OUT), KERNELS[name][1]
    buffer = torch.full((made.size[0], 3, made.size[1], m + 5), 0.5)
    out = buffer[:, 1, :, 2 : m + 2]
    sketched(name, made, out)
    assert launches == KERNELS[name][2]
    made.expected(sketch_of(name), before=0.5).check(out)
    out.fill_(0.5)
    assert (buffer == 0.5).all()


@kinds
@pytest.mark.parametrize("name", ["direct", "shear"])
def test_exact_on_integers_with_tokens_in_parts(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a slot's tokens begin and end within pairs."""
    monkeypatch.setattr(common, "parts", lambda _, length, *__, **___: (-(-length // 2), 2))
    made = uses(kind, D_IN, D_OUT, make=integers)
    assert torch.equal(sketched(name, made).double(), made.expected(sketch_of(name)).exact)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["summed", "ragged"])
def test_fft_in_parts_and_a_few_rows_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    made = uses(kind, D_IN, D_OUT)
    whole = sketched("fft", made)
    launches.clear()
    found = work(call_of(made, whole, "fft"))
    assert found is not None
    chunks = 8 * 256 * found.pairs * max(1, found.slots * found.rows // 3)
    assert torch.equal(sketched("fft", made, workspace=chunks), whole)
    assert len(launches) > 2, "one chunk held everything: chunks are not tested"
    monkeypatch.setattr(common, "parts", lambda _, length, *__, **___: (-(-length // 2), 2))
    made.expected(sketch_of("fft")).check(sketched("fft", made, workspace=chunks))


@pytest.mark.numeric
@kernels
@pytest.mark.parametrize(
    ("a_type", "g_type"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.half)]
)
def test_types_of_both_sides(name: str, a_type: torch.dtype, g_type: torch.dtype) -> None:
    made = uses("ragged", D_IN, D_OUT)
    made = made._replace(
        activations=[a.to(a_type) for a in made.activations], grad_outputs=[g.to(g_type) for g in made.grad_outputs]
    )
    expected = made.expected(sketch_of(name))
    one_product = name == "fft" and a_type == g_type  # transforms in fp16, as test_linear.py has it
    (replace(expected, eps=2.0**-12) if one_product else expected).check(sketched(name, made))


@pytest.mark.numeric
@kernels
def test_strided_views(name: str) -> None:
    """Steps of one tensor, every other token, and features that are not dense."""
    made = uses("equal", D_IN, D_OUT)
    a = list(torch.stack([torch.stack([a, a], 2).flatten(1, 2) for a in made.activations], 1)[:, :, ::2].unbind(1))
    g = [torch.stack([g, g], -1)[..., 0] for g in made.grad_outputs]
    m = KERNELS[name][1]
    out = sketched(name, made._replace(activations=a, grad_outputs=g), torch.zeros(m, 5, 2).permute(2, 1, 0))
    made.expected(sketch_of(name)).check(out)


@pytest.mark.numeric
@kernels
def test_programs_in_any_order(name: str, shuffle_programs: Callable[[int], None]) -> None:
    made = uses("ragged", D_IN, D_OUT)
    in_order, expected = sketched(name, made), made.expected(sketch_of(name))
    for seed in torch.randint(1 << 30, (3,)).tolist():
        shuffle_programs(seed)
        out = sketched(name, made)
        expected.check(out, f"seed {seed}")
        assert name != "fft" or torch.equal(out, in_order), f"seed {seed}"


def test_a_metric() -> None:
    made, metric = uses("summed", D_IN, D_OUT, make=integers), integers(D_OUT, D_IN)
    out = sketched("direct", made, metric=metric)
    assert torch.equal(out.double(), made.expected(sketch_of("direct"), metric=metric).exact)


@kernels
def test_nothing_to_add(name: str, launches: list[str]) -> None:
    made = uses("equal", D_IN, D_OUT)
    assert not sketched(name, made._replace(activations=[a[:0] for a in made.activations])).any()
    made = made._replace(
        activations=[a[:, :0] for a in made.activations], grad_outputs=[g[:, :0] for g in made.grad_outputs]
    )
    assert not sketched(name, made).any()
    assert launches == []


def aligned(activations: list[Tensor], grad_outputs: list[Tensor]) -> bool:
    pairs = len(activations)
    found = work(
        LinearStepsCall(torch.zeros(2, pairs, 8), activations, grad_outputs, [], 8, "direct", range(pairs), [0] * pairs)
    )
    assert found is not None
    return bool(found.constants["IS_ALIGNED"])


def test_wide_loads_only_where_every_row_of_every_pair_allows_them() -> None:
    a, g = torch.zeros(2, 3, 16), torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    assert aligned([a, a], [g, g])
    assert not aligned([a, a[:, :, 1:]], [g, g])  # an address
    assert not aligned([a, a], [g, torch.zeros(2, 3, 12, dtype=torch.bfloat16)[..., :8]])  # strides
    assert aligned([a, torch.zeros(2, 3, 20)[..., 4:]], [g, g])
    assert not aligned([a[..., :14].contiguous()], [g])


def test_rows_that_overlap_in_part_are_cut() -> None:
    """A program has all that is added to its row, so a row is written by one program."""
    a = torch.zeros(3, 2, D_IN)
    found = work(LinearStepsCall(torch.zeros(6, 2, 8), [a, a, a], [a, a, a], [], 8, "direct", [1, 1, 0], [0, 2, 3]))
    assert found is not None
    assert (found.slots, found.rows, found.pairs, found.tokens, found.longest) == (4, 3, 2, 4, 2)
    slots = found.table[: 4 * found.slots].view(found.slots, 4)
    assert slots[:, 1:].tolist() == [[1, 2, 8], [2, 1, 2 * 16 + 8], [1, 2, 3 * 16 + 8], [1, 3, 3 * 16]]


@pytest.mark.parametrize("route", ["direct", "shear", "fft"])
def test_the_operator_launches_once(route: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch_routes, "linear", lambda *_: pytest.fail("fell back to torch"))
    made, m = uses("equal", D_IN, D_OUT), KERNELS[route][1]
    out, sketch = torch.zeros(*made.size, m), sketch_of(route)
    launch.linear_steps_sketch_(call_of(made, out, route))
    assert launches == KERNELS[route][2]
    made.expected(sketch).check(out)


def test_deterministic_algorithms_take_fft(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    torch.use_deterministic_algorithms(True)
    made, sketch = uses("ragged", D_IN, D_OUT), sketch_of("fft")
    out = torch.zeros(*made.size, 256)
    launch.linear_steps_sketch_(call_of(made, out, "fft")._replace(route="direct"))
    assert launches == KERNELS["fft"][2]
    made.expected(sketch).check(out)


def test_float64_goes_to_the_torch_routes(launches: list[str]) -> None:
    made, sketch = uses("ragged", D_IN, D_OUT, torch.float64), sketch_of("direct")
    out = torch.zeros(*made.size, 64, dtype=torch.float64)
    launch.linear_steps_sketch_(call_of(made, out, "direct"))
    assert launches == []
    made.expected(sketch).check(out)
