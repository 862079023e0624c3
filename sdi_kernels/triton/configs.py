"""Tiles of the kernels that can be tuned: what ships, and what tuning may choose from. Imports no Triton.

A tile is looked up by kernel and by the kind of its matrix products (``direct`` also by the layer's size). The first
candidate of each list is the shipped one; all of them pass the compile gate (tests/kernels/compile_gate.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch

from sdi_kernels.triton import common


class DirectConfig(NamedTuple):
    """The tile of G, tokens per product, warps, pipelining depth."""

    block_out: int
    block_in: int
    block_tokens: int
    num_warps: int
    num_stages: int


class ShearConfig(NamedTuple):
    """Blocks x columns of a tile, tokens per product (16 of K each)."""

    blocks: int
    columns: int
    tokens: int
    num_warps: int
    num_stages: int


class PairwiseConfig(NamedTuple):
    """Train tokens x query tokens of a tile, features per product."""

    block_train: int
    block_query: int
    block_d: int
    num_warps: int
    num_stages: int


Config: TypeAlias = DirectConfig | ShearConfig | PairwiseConfig

# "half": both (all) inputs 16-bit of one dtype; "tf32", "tf32x3": one or three tf32 products.
CANDIDATES: Mapping[str, tuple[Config, ...]] = {
    "direct large half": (
        DirectConfig(128, 128, 64, 8, 3), DirectConfig(128, 128, 64, 8, 4), DirectConfig(128, 128, 32, 8, 4),
        DirectConfig(64, 128, 64, 4, 3),
    ),
    "direct large tf32": (
        DirectConfig(128, 128, 32, 8, 3), DirectConfig(128, 128, 32, 8, 4), DirectConfig(64, 128, 32, 4, 3),
    ),
    "direct large tf32x3": (
        DirectConfig(128, 64, 32, 8, 2), DirectConfig(128, 64, 32, 8, 3), DirectConfig(64, 64, 32, 4, 3),
    ),
    "direct small half": (
        DirectConfig(64, 64, 64, 4, 3), DirectConfig(64, 64, 32, 4, 4), DirectConfig(64, 32, 64, 4, 3),
    ),
    "direct small tf32": (DirectConfig(64, 64, 32, 4, 3), DirectConfig(64, 32, 32, 4, 3)),
    "direct small tf32x3": (DirectConfig(64, 64, 32, 4, 2), DirectConfig(64, 32, 32, 4, 2)),
    "shear half": (ShearConfig(64, 128, 2, 8, 2), ShearConfig(64, 64, 4, 8, 2), ShearConfig(64, 64, 2, 4, 2)),
    "shear tf32": (ShearConfig(64, 128, 2, 8, 2), ShearConfig(64, 64, 2, 8, 2)),
    "shear tf32x3": (ShearConfig(64, 64, 2, 8, 2), ShearConfig(64, 64, 2, 8, 1)),
    "pairwise half": (PairwiseConfig(64, 64, 64, 4, 3), PairwiseConfig(64, 64, 32, 4, 4)),
    "pairwise tf32": (PairwiseConfig(64, 64, 32, 4, 3), PairwiseConfig(64, 64, 32, 4, 2)),
    "pairwise tf32x3": (PairwiseConfig(64, 64, 32, 4, 1), PairwiseConfig(64, 64, 32, 8, 1)),
}  # fmt: skip

SHIPPED: Mapping[str, Config] = {key: candidates[0] for key, candidates in CANDIDATES.items()}

SMALL_SIDE = 96
"""Layers with a side up to this take the small tile of ``direct``."""


def kind(*dtypes: torch.dtype) -> str:
    """Kind of the matrix products of inputs of these dtypes, under the present precision settings."""
    if len(set(dtypes)) == 1 and dtypes[0] != torch.float32:
        return "half"
    precision = common.precision_of(*dtypes)
    return "tf32" if precision == "ieee" else precision


def direct_key(d_out: int, d_in: int, kind: str) -> str:
    return f"direct {'small' if min(d_out, d_in) <= SMALL_SIDE else 'large'} {kind}"
