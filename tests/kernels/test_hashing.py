"""Hash tables: the format "sdi-hash-1" pinned, the promises of each family, and the statistics of the draws."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from sdi_kernels import HASH_FAMILIES, HASH_FORMAT, CountSketch, HashFamily, TensorSketch
from sdi_kernels.hashing import (
    Role,
    difference_probability,
    draw_buckets,
    draw_signs,
    inverse_table,
    largest_difference_probability,
    used_blocks,
)

ROLES: tuple[Role, ...] = ("vector", "out", "in")
families = pytest.mark.parametrize("hashing", HASH_FAMILIES)
roles = pytest.mark.parametrize("role", ROLES)

# A change here makes every stored sketch incomparable with new ones. If it is meant, the format gets a new name.
GOLDEN_SEED, GOLDEN_NAME = 7, "block.attn.weight"
GOLDEN_BUCKETS: dict[tuple[HashFamily, Role, int, int], list[int]] = {
    ("iid", "vector", 8, 16): [9, 10, 11, 9, 11, 5, 1, 3],
    ("iid", "vector", 12, 5): [3, 3, 3, 3, 3, 1, 0, 1, 4, 1, 1, 0],
    ("iid", "out", 8, 16): [11, 9, 9, 13, 5, 0, 9, 2],
    ("iid", "out", 12, 5): [3, 2, 2, 4, 1, 0, 3, 0, 0, 1, 2, 4],
    ("iid", "in", 8, 16): [5, 3, 14, 14, 15, 11, 6, 5],
    ("iid", "in", 12, 5): [1, 1, 4, 4, 4, 3, 1, 1, 0, 1, 1, 4],
    ("balanced", "vector", 8, 16): [6, 11, 15, 10, 7, 5, 9, 12],
    ("balanced", "vector", 12, 5): [2, 3, 2, 1, 4, 4, 0, 3, 1, 0, 2, 1],
    ("balanced", "out", 8, 16): [5, 13, 12, 8, 15, 7, 4, 9],
    ("balanced", "out", 12, 5): [4, 1, 2, 3, 3, 0, 3, 2, 1, 4, 0, 4],
    ("balanced", "in", 8, 16): [0, 1, 2, 3, 4, 5, 6, 7],
    ("balanced", "in", 12, 5): [4, 1, 4, 3, 3, 2, 0, 3, 0, 2, 1, 0],
    ("block", "vector", 8, 16): [6, 11, 15, 10, 7, 5, 9, 12],
    ("block", "out", 8, 16): [5, 13, 12, 8, 15, 7, 4, 9],
    ("block", "out", 5, 24): [21, 5, 4, 0, 7],
    ("block", "out", 3, 64): [53, 61, 60],
    ("block", "out", 12, 5): [4, 1, 2, 3, 3, 0, 3, 2, 1, 4, 0, 4],
    ("block", "in", 8, 16): [0, 1, 2, 3, 4, 5, 6, 7],
}
GOLDEN_SIGNS: dict[Role, list[int]] = {
    "vector": [-1, 1, -1, -1, -1, -1, 1, -1, -1, 1, -1, 1],
    "out": [1, -1, -1, -1, -1, -1, 1, -1, -1, -1, 1, -1],
    "in": [1, -1, 1, 1, 1, -1, 1, 1, 1, -1, -1, -1],
}
# Tables of sizes that occur (a vocabulary, a hidden layer), an unusual name and a negative seed.
GOLDEN_FINGERPRINTS: dict[HashFamily, str] = {
    "iid": "6d7c21ed68b7175aa408c8cb0ec16fdd",
    "balanced": "9d6609ecf8d5b92a5ee97fbd4084f426",
    "block": "838aab032801bc604fc19473d0c5c63e",
}


def large_sketch(hashing: HashFamily) -> TensorSketch:
    return TensorSketch(
        1500 if hashing == "block" else 50_257, 768, 2048, seed=-(2**70), name='wte."ü"\n', hashing=hashing
    )


def bucket(
    d: int, m: int, hashing: HashFamily, role: Role = "out", seed: int = 3, name: str = "w"
) -> npt.NDArray[np.int32]:
    return draw_buckets(d, m, seed=seed, name=name, role=role, hashing=hashing)


# ---------------------------------------------------------------------------------------------------------------
# The format


@pytest.mark.parametrize("key", GOLDEN_BUCKETS, ids=str)
def test_golden_buckets(key: tuple[HashFamily, Role, int, int]) -> None:
    hashing, role, d, m = key
    drawn = draw_buckets(d, m, seed=GOLDEN_SEED, name=GOLDEN_NAME, role=role, hashing=hashing)
    assert drawn.dtype == np.int32
    assert drawn.tolist() == GOLDEN_BUCKETS[key], f"the tables of format {HASH_FORMAT!r} changed"


@roles
def test_golden_signs(role: Role) -> None:
    drawn = draw_signs(12, seed=GOLDEN_SEED, name=GOLDEN_NAME, role=role)
    assert drawn.dtype == np.int8
    assert drawn.tolist() == GOLDEN_SIGNS[role], f"the tables of format {HASH_FORMAT!r} changed"


def test_golden_format_name() -> None:
    assert HASH_FORMAT == "sdi-hash-1"
    assert HASH_FAMILIES == ("balanced", "iid", "block")


@families
def test_golden_fingerprint_of_large_tables(hashing: HashFamily) -> None:
    assert large_sketch(hashing).fingerprint == GOLDEN_FINGERPRINTS[hashing]


def philox_words(seed: int, name: str, stream: str, count: int) -> list[int]:
    """The stream of docs/design.md in plain Python integers: Philox-4x64-10 (Salmon et al. 2011), counter from 1."""
    label = json.dumps([HASH_FORMAT, seed, name, stream], ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.blake2b(label.encode("ascii"), digest_size=16).digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    mask, words, block = 2**64 - 1, [], 0
    while len(words) < count:
        block += 1
        x, (k0, k1) = [block, 0, 0, 0], keys
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(b >> 64) ^ x[1] ^ k0, b & mask, (a >> 64) ^ x[3] ^ k1, a & mask]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += x
    return words[:count]


def ranked(words: list[int]) -> list[int]:
    return sorted(range(len(words)), key=words.__getitem__)


@roles
@pytest.mark.parametrize(("seed", "name"), [(0, ""), (-5, "w"), (2**64 + 1, "π/⊗"), (1, 'a","b')])
def test_tables_follow_the_written_format(role: Role, seed: int, name: str) -> None:
    """A second implementation, from the text of docs/design.md alone, gives the same tables."""
    signs = [-1 if word >> 63 else 1 for word in philox_words(seed, name, f"{role}/sign", 11)]
    assert draw_signs(11, seed=seed, name=name, role=role).tolist() == signs

    words = philox_words(seed, name, f"{role}/bucket", 13)
    iid = [((word >> 32) * 13) >> 32 for word in words]
    assert bucket(13, 13, "iid", role, seed, name).tolist() == iid

    injective = list(range(6)) if role == "in" else ranked(words)[:6]
    assert bucket(6, 13, "balanced", role, seed, name).tolist() == injective

    blocked = injective
    if role == "out":  # blocks of gcd(24, 16) = 8 buckets, two of three used
        blocks = ranked(philox_words(seed, name, "out/block", 3))[:2]
        blocked = [8 * blocks[slot // 8] + slot % 8 for slot in ranked(philox_words(seed, name, "out/bucket", 16))[:6]]
        assert bucket(6, 24, "block", role, seed, name).tolist() == blocked
    else:
        assert np.array_equal(bucket(6, 24, "block", role, seed, name), bucket(6, 24, "balanced", role, seed, name))
    assert np.array_equal(bucket(13, 5, "block", role, seed, name), bucket(13, 5, "balanced", role, seed, name))

    slots = [*range(5), *range(5), *ranked(philox_words(seed, name, f"{role}/bucket/extra", 5))[:3]]
    dealt = dict(zip(ranked(words), slots, strict=True))
    assert bucket(13, 5, "balanced", role, seed, name).tolist() == [dealt[i] for i in range(13)]


def test_tables_do_not_depend_on_the_process() -> None:
    """Another interpreter, with another hash seed for str, draws the same tables."""
    code = (
        "from sdi_kernels import TensorSketch\n"
        "for family in ('balanced', 'iid'):\n"
        "    print(TensorSketch(700, 90, 128, seed=11, name='w', hashing=family).fingerprint)\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    here = [TensorSketch(700, 90, 128, seed=11, name="w", hashing=f).fingerprint for f in ("balanced", "iid")]
    assert result.stdout.split() == here


@families
def test_tables_do_not_depend_on_earlier_draws_or_numpys_state(hashing: HashFamily) -> None:
    first = bucket(100, 64, hashing)
    np.random.seed(0)  # noqa: NPY002  # the global stream is what must not matter
    bucket(10, 64, hashing, name="other")
    assert np.array_equal(first, bucket(100, 64, hashing))


@roles
def test_longer_tables_extend_shorter_ones(role: Role) -> None:
    """A layer that grows keeps the tables of its old coordinates, except where balancing d > m forbids it."""
    assert np.array_equal(
        draw_signs(500, seed=1, name="w", role=role)[:17], draw_signs(17, seed=1, name="w", role=role)
    )
    assert np.array_equal(bucket(500, 64, "iid", role)[:17], bucket(17, 64, "iid", role))
    assert np.array_equal(bucket(64, 64, "balanced", role)[:17], bucket(17, 64, "balanced", role))


def test_streams_of_different_keys_differ() -> None:
    """Keys that an additive or concatenating scheme would confuse: their sign streams are all unrelated."""
    d = 2048
    keys: list[tuple[int, str, Role]] = [
        *product((0, 1, 2, 11, -1), ("", "1", "2", "11", "a", "b"), ROLES),
        (1, "a/out", "in"),
        (1, "a", "out"),
        (1, 'a","out', "in"),
        (2**32, "a", "out"),
        (2**64, "a", "out"),
        (2**64 + 1, "a", "out"),
        (-(2**63), "a", "out"),
        (1, "a\u0301", "out"),
        (1, "á", "out"),
    ]
    keys = list(dict.fromkeys(keys))
    signs = np.stack([draw_signs(d, seed=s, name=n, role=r) for s, n, r in keys]).astype(np.float64)
    correlation = signs @ signs.T / d
    i, j = np.triu_indices(len(keys), 1)
    worst = int(np.abs(correlation[i, j]).argmax())
    # 4950 pairs of Gaussian correlations of width d**-0.5: 5.5 widths are exceeded once in 5000 such tests.
    assert abs(correlation[i[worst], j[worst]]) < 5.5 / d**0.5, f"{keys[i[worst]]} ~ {keys[j[worst]]}"


@families
def test_buckets_of_neighbouring_keys_are_unrelated(hashing: HashFamily) -> None:
    """Two tables agree in about d/m places; a shifted or shared stream would agree in all or in none."""
    d = m = 512
    tables = [
        bucket(d, m, hashing, role, seed, name) for seed, name, role in product((0, 1), ("a", "b"), ("vector", "out"))
    ]
    for left, right in combinations(tables, 2):
        for shift in range(4):
            assert (left[shift:] == right[: d - shift]).sum() < 12  # Poisson(1): P < 1e-9 each


# ---------------------------------------------------------------------------------------------------------------
# The balanced family


@roles
@pytest.mark.parametrize(("d", "m"), [(5, 5), (7, 3), (12, 4), (1000, 64), (65, 64), (63, 64), (1, 1), (9, 1), (1, 9)])
def test_balanced_loads_are_floor_or_ceil(role: Role, d: int, m: int) -> None:
    h = bucket(d, m, "balanced", role)
    loads = np.bincount(h, minlength=m)
    assert h.shape == (d,)
    assert len(loads) == m
    assert set(loads.tolist()) <= {d // m, -(-d // m)}


@pytest.mark.parametrize("role", ["vector", "out"])
def test_balanced_is_injective_and_random_up_to_m(role: Role) -> None:
    h = bucket(50, 64, "balanced", role)
    assert len(set(h.tolist())) == 50
    assert not np.array_equal(h, np.arange(50))
    assert not np.array_equal(h, bucket(50, 64, "balanced", role, seed=4))


def test_balanced_input_side_is_contiguous_up_to_m_and_random_beyond() -> None:
    for d in (1, 63, 64):
        assert np.array_equal(bucket(d, 64, "balanced", "in"), np.arange(d))
        assert CountSketch(d, 64, role="in").contiguous
    beyond = bucket(65, 64, "balanced", "in")
    assert not np.array_equal(beyond[:64], np.arange(64))
    assert not np.array_equal(beyond, bucket(65, 64, "balanced", "in", seed=4))
    assert not CountSketch(65, 64, role="in").contiguous
    assert not CountSketch(64, 64, role="out").contiguous


# ---------------------------------------------------------------------------------------------------------------
# The block family


@pytest.mark.parametrize(("d", "m"), [(1, 64), (15, 64), (33, 64), (63, 64), (5, 24), (9, 11), (700, 2048)])
def test_block_is_injective_within_as_few_blocks_as_allowed(d: int, m: int) -> None:
    size = math.gcd(m, 16)
    used, tables = max(-(-d // size), -(-m // (2 * size))), []
    for seed in range(20):
        h = bucket(d, m, "block", seed=seed)
        assert len(set(h.tolist())) == d
        assert 0 <= h.min() <= h.max() < m
        tables.append(set((h // size).tolist()))
        assert len(tables[-1]) <= used == used_blocks(d, m)
    if used < m // size:
        assert len({frozenset(t) for t in tables}) > 1, "always the same blocks"


@pytest.mark.parametrize(("d", "m"), [(5, 5), (12, 5), (64, 64), (100, 64)])
def test_block_is_balanced_where_all_buckets_are_used(d: int, m: int) -> None:
    assert np.array_equal(bucket(d, m, "block"), bucket(d, m, "balanced"))


@pytest.mark.parametrize(("d", "m"), [(2, 16), (5, 24), (7, 48), (40, 48), (3, 11)])
def test_block_differences_have_the_stated_probabilities(d: int, m: int) -> None:
    trials = 4000
    expected = np.array([difference_probability(x, d, m) for x in range(1, m)])
    assert expected.sum() == pytest.approx(1)
    assert expected.max() == largest_difference_probability(d, m)
    h = np.stack([bucket(d, m, "block", "out", seed) for seed in range(trials)])
    counts = np.bincount((h[:, 0].astype(int) - h[:, 1]) % m, minlength=m)
    assert counts[0] == 0
    assert uniform(counts[1:], trials * expected) > 1e-4


def uniform(counts: npt.NDArray[np.int64], expected: npt.ArrayLike | None = None) -> float:
    return float(stats.chisquare(counts, expected).pvalue)


def test_balanced_differences_are_uniform() -> None:
    """What the variance bound rests on: h(i) - h(k) is uniform over the non-zero residues (docs/design.md)."""
    m, trials = 7, 4000
    h = np.stack([bucket(3, m, "balanced", "out", seed) for seed in range(trials)])
    for i, k in ((0, 1), (1, 2), (0, 2)):
        counts = np.bincount((h[:, i] - h[:, k]) % m, minlength=m)
        assert counts[0] == 0
        assert uniform(counts[1:]) > 1e-4


def test_balanced_differences_are_uniform_beyond_m() -> None:
    """Collisions have the stated probability, other differences share the rest; no bucket is favoured."""
    d, m, trials = 8, 5, 4000
    h = np.stack([bucket(d, m, "balanced", "in", seed) for seed in range(trials)])
    full, rest = divmod(d, m)
    collision = (rest * (full + 1) * full + (m - rest) * full * (full - 1)) / (d * (d - 1))
    counts = np.bincount((h[:, 1] - h[:, 6]) % m, minlength=m)
    assert uniform(counts, trials * np.array([collision, *[(1 - collision) / (m - 1)] * (m - 1)])) > 1e-4
    assert uniform(np.bincount(h[:, 3], minlength=m)) > 1e-4
    loads = np.stack([np.bincount(row, minlength=m) for row in h])
    # Which buckets take one more: each equally often (the counts of one trial are dependent, so by hand).
    share = (loads == full + 1).mean(0)
    assert np.abs(share - rest / m).max() < 5 * (0.25 / trials) ** 0.5


# ---------------------------------------------------------------------------------------------------------------
# The iid family, and signs


@roles
@pytest.mark.parametrize("m", [64, 37])
def test_iid_buckets_are_uniform_and_independent(role: Role, m: int) -> None:
    h = bucket(200 * m, m, "iid", role).astype(np.int64)
    assert h.min() == 0
    assert h.max() == m - 1
    assert uniform(np.bincount(h, minlength=m)) > 1e-4
    pairs = np.bincount(h[0::2] * m + h[1::2], minlength=m * m)
    assert uniform(pairs) > 1e-4


@roles
def test_signs_are_fair_and_independent_of_buckets(role: Role) -> None:
    d, m = 20_000, 32
    s = draw_signs(d, seed=3, name="w", role=role)
    assert set(s.tolist()) == {-1, 1}
    assert uniform(np.bincount(s > 0, minlength=2)) > 1e-4
    assert uniform(np.bincount((s[:-1] > 0) * 2 + (s[1:] > 0), minlength=4)) > 1e-4
    for hashing in HASH_FAMILIES:
        h = bucket(d, m, hashing, role)
        assert uniform(np.bincount(h * 2 + (s > 0), minlength=2 * m)) > 1e-4


def test_signs_are_fair_over_seeds() -> None:
    """Unbiasedness is over seeds: neither one sign nor the product of two may lean."""
    trials = 4000
    s = np.stack([draw_signs(3, seed=seed, name="w", role="out") for seed in range(trials)]).astype(np.int64)
    for product_of in (s[:, 0], s[:, 2], s[:, 0] * s[:, 1], s[:, 0] * s[:, 1] * s[:, 2]):
        assert abs(product_of.sum()) < 4.5 * trials**0.5


# ---------------------------------------------------------------------------------------------------------------
# Inverse tables


@families
@pytest.mark.parametrize(("d", "m"), [(1, 1), (5, 9), (9, 5), (64, 64), (200, 7), (1, 40), (40, 1)])
def test_inverse_table_inverts(hashing: HashFamily, d: int, m: int) -> None:
    h, s = bucket(d, m, hashing), draw_signs(d, seed=3, name="w", role="out")
    table = inverse_table(h, s, m)
    assert table.dtype == np.int32
    assert table.shape == (m, max(1, np.bincount(h, minlength=m).max()))
    found = 0
    for p in range(m):
        entries = [int(e) for e in table[p]]
        sources = [abs(e) - 1 for e in entries if e]
        assert entries == [*[e for e in entries if e], *[0] * (len(entries) - len(sources))], "holes come last"
        assert sources == np.flatnonzero(h == p).tolist()
        assert [np.sign(e) for e in entries if e] == s[sources].tolist()
        found += len(sources)
    assert found == d


def test_inverse_table_gathers_a_count_sketch() -> None:
    h, s = bucket(30, 7, "iid"), draw_signs(30, seed=3, name="w", role="out")
    x = np.arange(1, 31)
    table = inverse_table(h, s, 7)
    gathered = (np.sign(table) * np.concatenate([[0], x])[np.abs(table)]).sum(1)
    assert gathered.tolist() == [int((s * x)[h == p].sum()) for p in range(7)]


# ---------------------------------------------------------------------------------------------------------------
# Errors


def test_unknown_family() -> None:
    with pytest.raises(ValueError, match=r"^hashing: got 'md5'; use one of 'balanced', 'iid', 'block'$"):
        draw_buckets(3, 4, seed=0, name="", role="out", hashing="md5")  # type: ignore[arg-type]
