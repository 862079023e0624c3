"""Feature arrays: growth batch by batch, summing, digests of weights."""

from __future__ import annotations

import pytest
import torch
from stepinfluence.attribution.features import FeatureBuilder, Features, _weighted_sums, weights_digest
from stepinfluence.attribution.space import Block, FeatureSpace
from stepinfluence.errors import FeatureMismatchError

SPACE = FeatureSpace("sketch", (Block("a", (2, 2), 0, 3), Block("b", (2,), 3, 5)), "tables", "weights")


def build(batches: list[tuple[int, int]], *, per_step: bool = True, expected: int = 0) -> tuple[Features, torch.Tensor]:
    """Features of batches of (rows, steps) filled with running numbers, and what they must be."""
    builder = FeatureBuilder(5, torch.float32, torch.device("cpu"), per_step=per_step, expected=expected)
    steps_max = max((s for _, s in batches), default=0)
    expected_rows, number = [], 0
    for rows, steps in batches:
        buffer = builder.reserve(rows, steps)
        assert buffer.shape == ((rows, steps, 5) if per_step else (rows, 5))
        assert not buffer.any()
        values = torch.arange(number, number + buffer.numel(), dtype=torch.float32).view(buffer.shape)
        number += buffer.numel()
        buffer += values
        padded = torch.zeros(rows, steps_max, 5) if per_step else values
        if per_step:
            padded[:, :steps] = values
        expected_rows.append(padded)
        ids = range(builder.count, builder.count + rows)
        labels = [f"step {k}" for k in range(steps)]
        builder.commit(list(ids), torch.arange(rows), labels, torch.full((rows,), steps) if per_step else None)
    return builder.finish(SPACE), torch.cat(expected_rows) if expected_rows else torch.zeros(0)


@pytest.mark.parametrize("expected", [0, 3, 9, 50])
@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize(
    "batches", [[(3, 2)], [(3, 2), (3, 2), (1, 2)], [(2, 1), (3, 4), (2, 2)], [(1, 3), (1, 1), (7, 5), (1, 6)]]
)
def test_builder(batches: list[tuple[int, int]], per_step: bool, expected: int) -> None:
    features, values = build(batches, per_step=per_step, expected=expected)
    assert torch.equal(features.values, values)
    assert len(features) == sum(rows for rows, _ in batches) == len(features.ids)
    assert features.steps.tolist() == [steps for rows, steps in batches for _ in range(rows)]
    assert len(features.step_labels) == max(steps for _, steps in batches)
    assert features.ids == tuple(range(len(features)))
    assert (features.lengths is not None) == per_step == features.per_step


def test_no_batches() -> None:
    features, _ = build([])
    assert len(features) == 0
    assert features.lengths is not None
    assert len(features.lengths) == 0


def test_overestimated_reservation_is_let_go() -> None:
    features, _ = build([(2, 3)], expected=1000)
    assert features.values.untyped_storage().nbytes() == 2 * 3 * 5 * 4


def test_summed() -> None:
    features, values = build([(3, 2), (2, 4)])
    summed = features.summed()
    assert torch.equal(summed.values, values.sum(1))
    assert summed.lengths is None
    assert not summed.per_step
    assert summed.summed() is summed
    assert repr(features) == "Features((5, 4, 5), sketch, per step, 2 parameters)"


def test_spaces_say_what_differs() -> None:
    SPACE.require_equal(FeatureSpace("sketch", SPACE.blocks, "tables", "weights"))
    different = {
        "exact features": FeatureSpace("exact", SPACE.blocks, "tables", "weights"),
        r"other parameters.*\(they differ in a\)": FeatureSpace(
            "sketch", (Block("a", (3, 2), 0, 3), SPACE.blocks[1]), "tables", "weights"
        ),
        "other sketches": FeatureSpace("sketch", SPACE.blocks, "others", "weights"),
        "other weights": FeatureSpace("sketch", SPACE.blocks, "tables", "others"),
    }
    for match, other in different.items():
        with pytest.raises(FeatureMismatchError, match=match):
            SPACE.require_equal(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_digest_sees_every_bit_and_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(7, 5).to(dtype), torch.randn(3).to(dtype)]
    digest = weights_digest(weights)
    assert digest == weights_digest([w.clone() for w in weights])
    assert digest == weights_digest([weights[0].T.contiguous().T, weights[1]])
    seen = {digest}
    for row in range(7):
        for column in range(5):
            changed = weights[0].clone()
            bits = changed.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[changed.element_size()])
            bits[row, column] ^= 1
            seen.add(weights_digest([changed, weights[1]]))
    seen |= {weights_digest(weights[::-1]), weights_digest([weights[0].flip(0), weights[1]])}
    seen.add(weights_digest([weights[0].reshape(5, 7), weights[1]]))
    assert len(seen) == 1 + 35 + 3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64])
def test_weighted_sums_are_exact(dtype: torch.dtype) -> None:
    """Digests are stored: however they are computed, they must stay what they are, in the largest numbers too."""
    limits = torch.iinfo(dtype)
    for count, start in ((0, 0), (1, 7), (64, 0), (65, 1 << 20), (4 * 64, 3), (1000, 1 << 33)):
        for fill in (limits.min, limits.max, None):
            data = torch.full((count,), fill or 0, dtype=dtype)
            if fill is None:
                data = torch.randint(limits.min, limits.max, (count,), dtype=dtype)
            places = [2 * (start + k) + 1 for k in range(count)]
            sums = [sum(v * p**e for v, p in zip(data.tolist(), places, strict=True)) for e in range(3)]
            wrapped = [(s + 2**63) % 2**64 - 2**63 for s in sums]
            assert _weighted_sums(data, start).tolist() == wrapped


def test_weights_digest_is_taken_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(7, 5), torch.randn(11), torch.arange(6.0).to_sparse(), torch.zeros(0)]
    digest = weights_digest(weights)
    monkeypatch.setattr("stepinfluence.attribution.features.DIGEST_ENTRIES", 4)
    assert weights_digest(weights) == digest
    assert weights_digest([weights[0], weights[1].flip(0), *weights[2:]]) != digest
