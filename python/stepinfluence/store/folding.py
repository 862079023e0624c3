"""Checkpoint folding: the features of K checkpoints in the space of one.

TracIn sums over checkpoints (paper, eq. 1): ``sum_k eta_k <g_k(z), phi_k(z')>``. Let ``s_k`` be independent random
signs, one per column and checkpoint. With ``F(z) = sum_k sqrt(eta_k) s_k * g_k(z)``, the inner product of two folded
rows is that sum, plus products across checkpoints whose expectation over the signs is zero: unbiased, at 1/K of the
bytes and of a scan's time, with more variance. The etas are in the rows: a folded checkpoint counts with 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdi_kernels.hashing import draw_signs
from stepinfluence.attribution.alignment import aligned_to
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.errors import FeatureMismatchError
from stepinfluence.store.checkpoints import StoredCheckpoint
from stepinfluence.store.manifest import Manifest
from stepinfluence.store.reader import Store
from stepinfluence.store.shards import FailedRow, RowInfo
from stepinfluence.store.writer import StoreWriter


def _factors(width: int, etas: Sequence[float], seed: int) -> Tensor:
    """``(K, D)``: signs times the roots of the etas."""
    for eta in etas:
        if not (eta >= 0 and math.isfinite(eta)):
            raise ValueError(f"etas: got {eta}; checkpoints can be folded with weights of zero or more")
    signs = [draw_signs(width, seed=seed, name=f"fold/{k}", role="vector") for k in range(len(etas))]
    return torch.from_numpy(np.stack(signs)).float() * torch.tensor(etas, dtype=torch.float64).sqrt().float()[:, None]


def folded_space(spaces: Sequence[FeatureSpace], etas: Sequence[float], seed: int) -> FeatureSpace:
    """What the columns of folded features mean: comparable only if folded from the same checkpoints, etas and seed."""
    first = spaces[0]
    for space in spaces[1:]:
        if (space.kind, space.blocks, space.tables) != (first.kind, first.blocks, first.tables):
            raise FeatureMismatchError("features: the checkpoints' columns differ; featurize all with one capture")

    def digest(*parts: object) -> str:
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    return replace(
        first,
        tables=digest("sdi-fold-1", first.tables, seed, [float(e) for e in etas]),
        weights=digest([s.weights for s in spaces]),
        model_weights=digest([s.model_weights for s in spaces]) if all(s.model_weights for s in spaces) else "",
        metric=digest([s.metric for s in spaces]) if any(s.metric for s in spaces) else "",
    )


def fold(features: Sequence[Features], etas: Sequence[float], *, seed: int = 0) -> Features:
    """One set of features whose inner products estimate ``sum_k eta_k <., .>_k`` of several checkpoints'.

    Args:
        features: of the same examples, one per checkpoint, all per step or all summed.
        etas: weight of each checkpoint, none negative.
        seed: of the signs; the same for everything that is to be compared.

    Returns:
        Features with the losses' mean over the checkpoints; use them with an eta of 1.

    Raises:
        FeatureMismatchError: examples or columns differ between checkpoints.
        ValueError: numbers of features and etas differ, an eta is negative, or only some features are per step.
    """
    if not features or len(features) != len(etas):
        raise ValueError(f"etas: got {len(etas)} for features of {len(features)} checkpoints; give one each")
    first = features[0]
    features = [first, *(aligned_to(first, other, "features") for other in features[1:])]
    if any(f.per_step != first.per_step for f in features):
        raise ValueError("features: some are per step and some summed over steps; featurize them alike")
    space = folded_space([f.space for f in features], etas, seed)
    factors = _factors(space.width, etas, seed).to(first.values)
    longest = max(features, key=lambda f: f.values.shape[1] if f.per_step else 0)
    values = torch.zeros_like(longest.values)
    for one, factor in zip(features, factors, strict=True):
        part = values[:, : one.values.shape[1]] if one.per_step else values
        part.addcmul_(one.values, factor)
    return Features(
        values=values,
        losses=torch.stack([f.losses for f in features]).mean(0),
        steps=torch.stack([f.steps for f in features]).amax(0),
        lengths=torch.stack([f.lengths for f in features if f.lengths is not None]).amax(0) if first.per_step else None,
        ids=first.ids,
        space=space,
        step_labels=max((f.step_labels for f in features), key=len),
    )


def fold_manifest(manifest: Manifest, *, seed: int = 0) -> Manifest:
    """The manifest of a store's folded twin: one checkpoint, with what was folded on record."""
    etas = [c.eta for c in manifest.checkpoints]
    space = folded_space([c.space for c in manifest.checkpoints], etas, seed)
    parts = [
        {"name": c.name, "eta": c.eta, "weights": c.space.weights, "model_weights": c.space.model_weights}
        for c in manifest.checkpoints
    ]
    name = f"fold of {len(etas)}"
    one = StoredCheckpoint(name, 1.0, space, "its checkpoints are folded into one; use the store that was folded")
    return replace(manifest, checkpoints=(one,), fold={"seed": seed, "checkpoints": parts})


def fold_store(path: str | Path, out: str | Path, *, seed: int = 0) -> Store:
    """Write the folded twin of a store, shard by shard; resumes if it was begun. A row that failed at one checkpoint
    counts as failed.

    Raises:
        StoreError, ValueError: the store is incomplete, damaged or has a negative eta.
    """
    store = Store.open(path)
    writer = StoreWriter.create(out, fold_manifest(store.manifest, seed=seed))
    etas = [c.eta for c in store.checkpoints]
    failed = store.failed
    for shard in writer.pending(0):
        numbers = store.manifest.rows_of(shard)
        kept = [row for row in numbers if row not in failed]
        features = [store.features(k, rows=kept) for k in range(len(etas))]
        rows = [RowInfo(r.id, r.text, r.metadata, r.tokens) for r in (store.row(row) for row in numbers)]
        bad = [FailedRow(row, failed[row]) for row in numbers if row in failed]
        writer.write_shard(0, shard, fold(features, etas, seed=seed) if kept else None, rows, bad)
    writer.finish()
    return Store.open(out)
