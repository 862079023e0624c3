"""Feature stores: featurize once, ask many times (docs/store.md).

A store holds the features of one dataset at one or more checkpoints, in shards of safetensors that are memory-mapped to
be read, can be written by many processes, and survive being killed at any moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepinfluence.lazy import lazily

if TYPE_CHECKING:
    from stepinfluence.store.checkpoints import StoredCheckpoint
    from stepinfluence.store.codecs import decode, encode
    from stepinfluence.store.dtypes import NUMPY_DTYPES, STORE_DTYPES, StoreDtype, bytes_per_row
    from stepinfluence.store.exporting import export
    from stepinfluence.store.folding import fold, fold_manifest, fold_store
    from stepinfluence.store.maintain import merge, verify
    from stepinfluence.store.manifest import Manifest, SketchSpec
    from stepinfluence.store.models import checkpoint_of, model_digest, model_fingerprint
    from stepinfluence.store.reader import Store
    from stepinfluence.store.rows import StoredRow
    from stepinfluence.store.shards import FailedRow, RowInfo
    from stepinfluence.store.writer import StoreWriter, is_unwritten

__all__ = [
    "NUMPY_DTYPES",
    "STORE_DTYPES",
    "FailedRow",
    "Manifest",
    "RowInfo",
    "SketchSpec",
    "Store",
    "StoreDtype",
    "StoreWriter",
    "StoredCheckpoint",
    "StoredRow",
    "bytes_per_row",
    "checkpoint_of",
    "decode",
    "encode",
    "export",
    "fold",
    "fold_manifest",
    "fold_store",
    "is_unwritten",
    "merge",
    "model_digest",
    "model_fingerprint",
    "verify",
]

# At first use: what a store holds is told without torch.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "stepinfluence.store.codecs": ("decode", "encode"),
        "stepinfluence.store.dtypes": ("NUMPY_DTYPES", "STORE_DTYPES", "StoreDtype", "bytes_per_row"),
        "stepinfluence.store.exporting": ("export",),
        "stepinfluence.store.folding": ("fold", "fold_manifest", "fold_store"),
        "stepinfluence.store.maintain": ("merge", "verify"),
        "stepinfluence.store.checkpoints": ("StoredCheckpoint",),
        "stepinfluence.store.manifest": ("Manifest", "SketchSpec"),
        "stepinfluence.store.models": ("checkpoint_of", "model_digest", "model_fingerprint"),
        "stepinfluence.store.reader": ("Store",),
        "stepinfluence.store.rows": ("StoredRow",),
        "stepinfluence.store.shards": ("FailedRow", "RowInfo"),
        "stepinfluence.store.writer": ("StoreWriter", "is_unwritten"),
    },
)
