"""The bound of accuracy.py: passes what is only rounded, in any order, and fails what is wrong."""

from __future__ import annotations

import functools

import pytest
import torch
from accuracy import Expected, inner_products, multilinear
from sketch_cases import expected_linear
from torch import Tensor

from sdi_kernels import TensorSketch

pytestmark = pytest.mark.numeric


def orders(terms: Tensor) -> list[Tensor]:
    """Sums of the last dimension in float32 as several CPUs make them: by lanes, blocks, one after the other."""
    n = terms.shape[-1]
    one_by_one = terms[..., 0]
    for k in range(1, n):
        one_by_one = one_by_one + terms[..., k]
    lanes = [terms.unflatten(-1, (-1, width)) for width in (4, 8, 16)]
    by_lanes = []
    for parts in lanes:
        total = parts[..., 0, :]
        for k in range(1, parts.shape[-2]):
            total = total + parts[..., k, :]
        by_lanes.append(total.sum(-1))
    return [one_by_one, *by_lanes, terms.flip(-1).cumsum(-1)[..., -1]]


def cancelling() -> tuple[Tensor, Tensor]:
    """Factors of inner products that cancel to a hundred-thousandth of their terms."""
    left, right = torch.randn(20, 64), torch.randn(20, 64)
    left[:, -1], right[:, -1] = -(left[:, :-1] * right[:, :-1]).sum(-1) * (1 + 1e-5), 1
    return left, right


def test_what_cancels_depends_on_the_order_and_passes_in_any() -> None:
    left, right = cancelling()
    expected = inner_products("nk,nk->n", left, right)
    found = orders(left * right)
    apart = [((f - expected.exact) / expected.exact).abs().max() for f in found]
    assert max(apart) > 1e-5, "a fixed relative tolerance would do for these inputs"
    for sums in found:
        assert expected.excess(sums) <= 1


def test_torch_exact_by_luck_leaves_a_bound() -> None:
    left, right = cancelling()
    expected = inner_products("nk,nk->n", left, right)
    lucky = Expected(expected.exact, expected.exact, expected.magnitude, rows=False)
    for sums in orders(left * right):
        assert lucky.excess(sums) <= 1


# What may go wrong in a sketch of a linear layer: applied to its inputs, each has to be found out.
WRONG = {
    "a token dropped": lambda a, g, _: (a[:, 1:], g[:, 1:]),
    "a token twice": lambda a, g, _: (torch.cat([a, a[:, :1]], 1), torch.cat([g, g[:, :1]], 1)),
    "the sign of a feature": lambda a, g, _: (a * torch.tensor([-1.0] + [1.0] * (a.shape[-1] - 1)), g),
    "two features exchanged": lambda a, g, _: (a[..., [1, 0, *range(2, a.shape[-1])]], g),
    "rows exchanged": lambda a, g, _: (a.flip(0), g),
    "half precision": lambda a, g, _: (a.bfloat16().float(), g),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("shape", [(2, 5, 12, 10, 64), (2, 300, 40, 30, 256), (2, 40, 300, 200, 16)], ids=str)
def test_wrong_sketches_are_noticed(shape: tuple[int, ...], wrong: str) -> None:
    rows, tokens, d_out, d_in, m = shape
    a, g = torch.randn(rows, tokens, d_in), torch.randn(rows, tokens, d_out)
    sketch = TensorSketch(d_out, d_in, m)
    expected = expected_linear(a, g, sketch)
    expected.check(expected.plain)
    found = expected_linear(*WRONG[wrong](a, g, sketch), sketch).exact
    assert expected.excess(found) > 10
    bucket = sketch.out.bucket.copy()
    bucket[0] = (bucket[0] + 1) % m
    moved = TensorSketch.from_tables(bucket, sketch.out.sign, sketch.inp.bucket, sketch.inp.sign, m)
    assert expected.excess(expected_linear(a, g, moved).exact) > 10, "a feature in the wrong bucket"


def test_nan_and_shapes_are_wrong() -> None:
    expected = inner_products("nk,nk->n", torch.ones(2, 3), torch.ones(2, 3))
    assert expected.excess(torch.tensor([3.0, torch.nan])) == torch.inf
    with pytest.raises(AssertionError, match="shape"):
        expected.excess(torch.zeros(3))


def test_zero_has_to_be_zero() -> None:
    expected = multilinear(lambda a, b: a * b, torch.zeros(2, 3), torch.zeros(2, 3))
    expected.check(torch.zeros(2, 3))
    assert expected.excess(torch.full((2, 3), 1e-30)) == torch.inf


def test_a_bound_too_wide_to_fail_is_refused() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(AssertionError, match="cannot fail: a swapped sign goes unnoticed"):
        Expected(x.double(), x, 1e9 * x.abs()).check(x)


def largest_share(difference: Tensor, size: Tensor) -> Tensor:
    return (difference / size).max()


def test_two_ways_to_a_sum_may_differ_by_rounding_alone() -> None:
    """Steps added up one by one and at once; a step left out, or turned, is no rounding."""
    steps = torch.randn(5, 7, 40)
    expected = multilinear(lambda x: x.sum(1), steps)
    one_by_one = functools.reduce(torch.add, steps.unbind(1)).double()
    without_first, turned = (steps[:, 1:].double().sum(1), steps[:, 1:].double().sum(1) - steps[:, 0].double())

    def found(other: Tensor) -> float:
        return float(largest_share((other - expected.exact).norm(dim=-1), expected.exact.norm(dim=-1)))

    expected.check_difference(found(one_by_one), largest_share, without_first)
    for wrong in (without_first, turned, expected.exact.roll(1, 0)):
        with pytest.raises(AssertionError, match="where rounding explains"):
            expected.check_difference(found(wrong), largest_share, without_first)
    with pytest.raises(AssertionError, match="cannot fail"):
        expected.check_difference(0.0, largest_share, one_by_one)
