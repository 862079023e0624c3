"""Sketched inner products over draws of the tables: unbiased, with the stated variance, in every family.

Two kinds of test. *Enumerations* go through every table of a small sketch and check the formula of docs/design.md to
rounding. *Draws* take tables as users get them and check that their mean and variance are the formula's, within
``SIGMAS`` standard errors. Draw t has seed t, so that a failure is one for good, never bad luck.
"""

from __future__ import annotations

import functools
import itertools
import math
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import sdi_kernels as sk
from sdi_kernels import CountSketch, HashFamily, TensorSketch
from sdi_kernels.variance import collision
from sdi_kernels.variance import matrix_bound as bound

Array = npt.NDArray[np.float64]

# The formula and the draws are those of the benchmark, so that what the documentation prints is what is tested.
TABLE = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "variance_table.py"))
cases: Callable[[int], list[Any]] = TABLE["cases"]
exact_variance: Callable[[Array, Array, int, HashFamily], float] = TABLE["exact_variance"]
inner_products: Callable[[Array, Array, int, HashFamily, int], Array] = TABLE["inner_products"]

TRIALS = 1500
SIGMAS = 4.5
OTHER_TRIALS = 1000
CASES = {case.name: case for case in cases(0)}

families = pytest.mark.parametrize("hashing", sk.HASH_FAMILIES)


@functools.cache
def draws(name: str, hashing: HashFamily) -> Array:
    """``<TS(X), TS(Y)>`` of a case for each of the first ``TRIALS`` tables."""
    return inner_products(CASES[name].x, CASES[name].y, CASES[name].m, hashing, TRIALS)


def check_mean(samples: Array, expected: float) -> None:
    z = (samples.mean() - expected) / (samples.std(ddof=1) / len(samples) ** 0.5 + 1e-12)
    assert abs(z) < SIGMAS, (
        f"mean {samples.mean():.6g} over {len(samples)} draws, expected {expected:.6g}: {z:+.1f} standard errors off. "
        "Likely cause: signs that are not fair, or not independent of each other or of the buckets"
    )


def check_variance(samples: Array, expected: float) -> None:
    deviations = (samples - samples.mean()) ** 2
    variance, error = deviations.mean(), deviations.std() / len(samples) ** 0.5
    z = (variance - expected) / error
    assert abs(z) < SIGMAS, (
        f"variance {variance:.6g} over {len(samples)} draws, formula {expected:.6g}: {z:+.1f} standard errors off. "
        "Likely cause: buckets that collide more (or less) often than the family states, signs of the two sides that "
        "are correlated, or seeds that repeat a table"
    )


# ---------------------------------------------------------------------------------------------------------------
# Enumerations


def all_buckets(d: int, m: int, hashing: HashFamily, side: str) -> Iterator[tuple[int, ...]]:
    """Every bucket table of a family, as often as the others."""
    if hashing == "iid":
        yield from itertools.product(range(m), repeat=d)
    elif side == "in" and d <= m:
        yield tuple(range(d))
    elif hashing == "block" and side == "out" and d < m:
        size = math.gcd(m, 16)
        used = max(-(-d // size), -(-m // (2 * size)))
        for blocks in itertools.permutations(range(m // size), used):
            for slots in itertools.permutations(range(used * size), d):
                yield tuple(size * blocks[s // size] + s % size for s in slots)
    elif d <= m:
        yield from itertools.permutations(range(m), d)
    else:
        full, rest = divmod(d, m)
        for extra in itertools.combinations(range(m), rest):
            yield from itertools.permutations([*list(range(m)) * full, *extra])


def all_inner_products(x: Array, y: Array, m: int, hashing: HashFamily) -> Array:
    """``<TS(X), TS(Y)>`` for every pair of bucket tables and every choice of signs."""
    d_out, d_in = x.shape
    signs = np.array(list(itertools.product((-1, 1), repeat=d_out + d_in)))
    sign = signs[:, :d_out, None] * signs[:, None, d_out:]
    signed = [(sign * matrix).reshape(len(signs), -1) for matrix in (x, y)]
    results = []
    for h_out in all_buckets(d_out, m, hashing, "out"):
        for h_in in all_buckets(d_in, m, hashing, "in"):
            position = (np.array(h_out)[:, None] + h_in) % m
            one_hot = np.equal.outer(position.ravel(), np.arange(m)).astype(float)
            results.append(((signed[0] @ one_hot) * (signed[1] @ one_hot)).sum(1))
    return np.concatenate(results)


@pytest.mark.parametrize(
    ("d_out", "d_in", "m", "hashing"),
    [
        (2, 2, 4, "iid"),
        (2, 2, 3, "iid"),
        (3, 2, 4, "iid"),
        (2, 1, 2, "iid"),
        (2, 2, 1, "iid"),
        (3, 4, 4, "balanced"),
        (3, 4, 5, "balanced"),
        (4, 3, 4, "balanced"),
        (3, 6, 6, "balanced"),
        (5, 2, 3, "balanced"),  # one side beyond m
        (4, 4, 2, "balanced"),  # both
        (2, 5, 4, "balanced"),
        (2, 3, 1, "balanced"),
        (2, 4, 6, "block"),  # three blocks of two buckets, two of them used, and columns m/2 apart
        (4, 3, 6, "block"),  # two used, and full
        (2, 4, 12, "block"),  # three blocks of four, two of them used
        (3, 3, 4, "block"),  # all buckets in one block
        (2, 3, 5, "block"),  # no blocks: gcd(5, 16) = 1
        (2, 5, 4, "block"),  # d_in beyond m
        (5, 2, 4, "block"),  # d_out beyond m: balanced
    ],
)
def test_formula_by_enumeration(d_out: int, d_in: int, m: int, hashing: HashFamily) -> None:
    """Mean and variance over *all* tables: Lemma 4 of the paper (its equation 23), and ours for balanced."""
    draw = np.random.default_rng(d_out + 10 * d_in + 100 * m)
    x, y = draw.standard_normal((2, d_out, d_in))
    for left, right in ((x, y), (x, x)):
        products = all_inner_products(left, right, m, hashing)
        assert products.mean() == pytest.approx((left * right).sum(), rel=1e-9)
        assert products.var() == pytest.approx(exact_variance(left, right, m, hashing), rel=1e-9)


def test_formula_is_lemma_4_for_iid() -> None:
    """In the paper's own terms. Its statement has P1, N1 and P2, N2 swapped; its proof (equation 23) is right."""
    x, y = np.random.default_rng(0).standard_normal((2, 7, 5))
    m, columns, rows = 16, x.T @ y, x @ y.T
    hadamard, diagonals = ((x * y) ** 2).sum(), (np.diag(columns) ** 2).sum() + (np.diag(rows) ** 2).sum()
    p1 = (columns**2).sum() + (rows**2).sum() + 2 * hadamard
    n1 = diagonals + np.trace((x @ x.T) * (y @ y.T)) + np.trace((x.T @ x) * (y.T @ y))
    p2 = p1 + 2 * np.trace(columns @ columns) + (x * y).sum() ** 2 + (x**2).sum() * (y**2).sum()
    n2 = n1 + 2 * diagonals
    lemma = (p2 - n2) / m + 2 * (p1 - n1) / m**2
    assert exact_variance(x, y, m, "iid") == pytest.approx(lemma, rel=1e-12)


def test_stated_bounds() -> None:
    for m in (2, 8, 128, 2048):
        assert bound(m, m, m, "iid") == pytest.approx(6 / m + 4 / m**2)
        assert bound(9 * m, 5 * m, m, "iid") == pytest.approx(6 / m + 4 / m**2)
        assert bound(m, m, m, "balanced") == pytest.approx(2 / (m - 1))
        assert bound(m, m, m, "balanced") <= 2 / (m - 1) + 2 / (m - 1) ** 2
    for m in (64, 128, 2048):  # block: balanced where d_out comes near m, at most twice that below; under the paper's
        assert bound(m, m, m, "block") == bound(m, m, m, "balanced")
        assert bound(m - 1, m, m, "block") == pytest.approx(2 / (m - 1))
        assert bound(3 * m // 4, m, m, "block") == pytest.approx(8 / 3 / m, rel=0.04)
        for d_out in (2, m // 4, m // 2):
            assert bound(d_out, m, m, "block") == bound(2, m, m, "block") == pytest.approx(4 / m, rel=0.04)
    # Beyond m, where a side needs collisions: still under the paper's bound.
    for d_out, d_in in ((96, 160), (65, 64), (64, 65), (6400, 6400)):
        assert 2 / 63 < bound(d_out, d_in, 64, "balanced") < bound(d_out, d_in, 64, "iid")


@families
@pytest.mark.parametrize(("d_out", "d_in", "m"), [(6, 8, 8), (5, 6, 7), (9, 4, 6), (4, 9, 6), (9, 13, 4), (3, 3, 16)])
def test_no_matrix_exceeds_the_bound(hashing: HashFamily, d_out: int, d_in: int, m: int) -> None:
    """Random, sparse, low-rank, equal, and with columns that a fixed h_in(j) = j treats worst."""
    draw, worst = np.random.default_rng(0), 0.0
    for trial in range(300):
        x = draw.standard_normal((d_out, d_in)) * (draw.random((d_out, d_in)) < draw.uniform(0.1, 1))
        if trial % 3 == 0:
            x = draw.standard_normal((d_out, 1)) * draw.choice([0, 1], (1, d_in))
        y = x if trial % 2 else draw.standard_normal((d_out, d_in)) * draw.choice([0, 1], (1, d_in))
        scale = (x**2).sum() * (y**2).sum()
        if scale > 0:
            worst = max(worst, exact_variance(x, y, m, hashing) / scale)
    assert 0 < worst <= bound(d_out, d_in, m, hashing) * (1 + 1e-12)


def test_bounds_are_attained_in_the_limit() -> None:
    """They are not slack: large matrices of ones (iid), and two columns m/2 apart (balanced)."""
    m, d = 1024, 900
    ones = np.ones((d, d))
    assert exact_variance(ones, ones, m, "iid") / d**4 > 0.99 * bound(d, d, m, "iid")
    pair = np.zeros((d, d))
    pair[:, [3, 3 + m // 2]] = 1
    assert exact_variance(pair, pair, m, "balanced") / (2 * d) ** 2 > 0.99 * bound(d, d, m, "balanced")


# ---------------------------------------------------------------------------------------------------------------
# Draws: TensorSketch


@families
@pytest.mark.parametrize("name", CASES)
def test_tensor_sketch_is_unbiased_with_the_stated_variance(hashing: HashFamily, name: str) -> None:
    x, y, m = CASES[name].x, CASES[name].y, CASES[name].m
    samples = draws(name, hashing)
    assert len(samples) == TRIALS
    check_mean(samples, float((x * y).sum()))
    expected = exact_variance(x, y, m, hashing)
    check_variance(samples, expected)
    scale = float((x**2).sum() * (y**2).sum())
    assert expected <= scale * bound(*x.shape, m, hashing)


@pytest.mark.parametrize("name", CASES)
def test_balanced_has_less_variance_than_iid(name: str) -> None:
    x, y, m = CASES[name].x, CASES[name].y, CASES[name].m
    balanced, iid = (exact_variance(x, y, m, family) for family in ("balanced", "iid"))
    assert balanced < iid
    if "gaussian" not in name:  # where nothing adversarial collides, there is little to win
        drawn = {family: draws(name, family).var() for family in ("balanced", "iid")}
        assert drawn["balanced"] < 0.8 * drawn["iid"], f"{drawn}: are the balanced buckets balanced?"


def test_draws_go_through_the_public_functions_unchanged() -> None:
    """The vectorised draws above are what users compute: sketches of gradients, then an inner product."""
    case = CASES["shared left factor 64×48"]
    samples = inner_products(case.x, case.y, case.m, "balanced", 20)
    for seed in range(20):
        sketch = TensorSketch(64, 48, case.m, seed=seed, name="w")
        tx, ty = (sk.sketch_matrix_grads(torch.from_numpy(z), sketch) for z in (case.x, case.y))
        assert float(tx @ ty) == pytest.approx(samples[seed], rel=1e-9)


@families
def test_sketches_of_different_parameters_are_independent(hashing: HashFamily) -> None:
    """Two parameters' sketches may share bins: their cross term has mean zero and the variance of chance."""
    m, trials = 64, OTHER_TRIALS
    x, y = np.ones((24, 20)), np.ones((24, 20))
    cross = np.empty(trials)
    for seed in range(trials):
        first, second = (
            sk.sketch_matrix_grads(torch.from_numpy(z), TensorSketch(24, 20, m, seed=seed, name=name, hashing=hashing))
            for z, name in ((x, "layers.0.weight"), (y, "layers.1.weight"))
        )
        cross[seed] = float(first @ second)
    check_mean(cross, 0.0)
    check_variance(cross, (x**2).sum() * (y**2).sum() / m)


# ---------------------------------------------------------------------------------------------------------------
# Draws: CountSketch


def count_inner_products(x: Array, y: Array, m: int, hashing: HashFamily, trials: int) -> Array:
    samples = np.empty(trials)
    both = torch.from_numpy(np.stack([x, y]))[:, None]
    for seed in range(trials):
        tx, ty = sk.sketch_vector_grads(both, CountSketch(len(x), m, seed=seed, hashing=hashing))
        samples[seed] = float(tx @ ty)
    return samples


@pytest.mark.parametrize(
    ("d", "m", "hashing"), [(40, 64, "iid"), (96, 64, "iid"), (96, 64, "balanced"), (200, 64, "balanced")]
)
def test_count_sketch_is_unbiased_with_the_stated_variance(d: int, m: int, hashing: HashFamily) -> None:
    """Lemma 2 of the paper, with the family's own probability of a collision in place of 1/m."""
    x, y = np.ones(d), np.linspace(-1, 3, d)
    samples = count_inner_products(x, y, m, hashing, OTHER_TRIALS)
    check_mean(samples, float(x @ y))
    same = float((x**2) @ (y**2))
    pairs = float((x @ x) * (y @ y) + (x @ y) ** 2) - 2 * same
    check_variance(samples, collision(d, m, hashing) * pairs)
    assert collision(d, m, hashing) <= 1 / m


@pytest.mark.parametrize("d", [1, 33, 64])
def test_balanced_count_sketch_is_lossless_up_to_m(d: int) -> None:
    """A permutation with signs: inner products, and the vector itself, come back exactly."""
    x, y = np.random.default_rng(d).standard_normal((2, d))
    samples = count_inner_products(x, y, 64, "balanced", 50)
    np.testing.assert_allclose(samples, x @ y, rtol=1e-12, atol=1e-12)
    sketch = CountSketch(d, 64)
    sketched = sk.sketch_vector_grads(torch.from_numpy(x)[None], sketch).numpy()
    assert np.array_equal(sketched[sketch.bucket] * sketch.sign, x)


# ---------------------------------------------------------------------------------------------------------------
# The relative error that the paper reports


@families
def test_error_falls_with_the_square_root_of_m(hashing: HashFamily) -> None:
    """Log-log slope -1/2 of the error of a pair, with d below m throughout (paper, section 5)."""
    x, y = np.random.default_rng(1).standard_normal((2, 32, 24))
    sizes = [64, 256, 1024]
    errors = [math.sqrt(np.mean((inner_products(x, y, m, hashing, 400) - (x * y).sum()) ** 2)) for m in sizes]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_table_prints(capsys: pytest.CaptureFixture[str]) -> None:
    TABLE["main"](["--trials", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + len(CASES)
    assert all(name in line for name, line in zip(CASES, lines[4:], strict=True))
