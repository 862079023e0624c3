"""``scores``: the whole table, in memory or streamed to a file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import made
import numpy as np
import pytest
import torch
from accuracy import Expected, multilinear
from stepinfluence import StoreError, influence
from stepinfluence.search import scan, scores
from torch import Tensor

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("train_steps", [None, 3])
def test_equals_influence(tmp_path: Path, dtype: str, train_steps: int | None) -> None:
    shape = (45, made.WIDTH) if train_steps is None else (45, train_steps, made.WIDTH)
    sides = [
        [made.features(made.normal(*s, seed=k), prefix=p, weights=f"w{k}") for k in range(2)]
        for p, s in (("z", shape), ("q", (4, 3, made.WIDTH)))
    ]
    etas = (0.3, 0.7)
    train, query = (made.store(tmp_path / str(k), side, etas=etas, dtype=dtype) for k, side in enumerate(sides))
    decoded = [[s.features(k) for k in range(2)] for s in (train, query)]
    whole = influence(*decoded, etas=etas)
    values = [f.values for side in decoded for f in side]  # of the train side, then of the query side

    def plain(*v: Tensor) -> Tensor:
        equation = "nd,qtd->nqt" if train_steps is None else "nsd,qtd->nqt"
        return sum(eta * torch.einsum(equation, v[k], v[k + 2]) for k, eta in enumerate(etas))  # type: ignore[return-value]

    expected = multilinear(plain, *values, rows=False)
    expected.check(whole.sdi, "influence:")
    for out in (None, tmp_path / "scores.npy"):
        found = scores(train, query, out=out)
        expected.check(found.sdi, "scores:")
        assert (found.train_ids, found.query_ids, found.etas) == (whole.train_ids, whole.query_ids, etas)
    file = np.load(tmp_path / "scores.npy")
    assert file.shape == (45, 4, 3)
    assert file.dtype == np.float32
    some = scores(train, query, steps=slice(1, 3))
    kept = slice(1, None)
    Expected(expected.exact[..., kept], expected.plain[..., kept], expected.magnitude[..., kept], rows=False).check(
        some.sdi, "some steps:"
    )


def test_examples_that_failed_are_nan(tmp_path: Path) -> None:
    train = made.store(tmp_path / "t", [made.features(made.normal(9, made.WIDTH))], failed=[2, 8])
    query = made.store(tmp_path / "q", [made.features(made.normal(3, 2, made.WIDTH))], failed=[1])
    found = scores(train, query).sdi.isnan()
    expected = torch.zeros(9, 3, 2, dtype=torch.bool)
    expected[[2, 8]] = True
    expected[:, 1] = True
    assert torch.equal(found, expected)


def test_memory_does_not_grow_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's and torch's buffers: the former are traced, the latter are blocks of a size that is set here."""
    monkeypatch.setattr(scan, "BLOCK_BYTES", 1 << 14)
    query = made.features(made.normal(8, 4, made.WIDTH))
    peaks = []
    original = scan.products
    for n in (2_000, 20_000):
        train = made.features(made.normal(n, made.WIDTH))
        seen: list[int] = []

        def watched(block: scan.RawBlock, *args: object, seen: list[int] = seen) -> torch.Tensor:
            result: torch.Tensor = original(block, *args)  # type: ignore[arg-type]
            seen.append(result.numel())
            return result

        with monkeypatch.context() as patch:
            patch.setattr(scan, "products", watched)
            tracemalloc.start()
            scores(train, query, out=tmp_path / f"{n}.npy")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert max(seen) * 4 <= 1 << 14
        assert sum(seen) == n * 32
    assert peaks[1] < 2 * peaks[0] + (1 << 16)


def test_the_file_is_whole_or_not_there(tmp_path: Path) -> None:
    train, query = made.features(made.normal(9, made.WIDTH)), made.features(made.normal(2, 2, made.WIDTH))
    with pytest.raises(ValueError, match=r"\.npy"):
        scores(train, query, out=tmp_path / "scores.bin")
    with pytest.raises(StoreError, match="could not be written"):
        scores(train, query, out=tmp_path / "missing" / "scores.npy")
    assert list(tmp_path.iterdir()) == []
