"""Feature stores: featurize once, ask many times (docs/store.md).

A store holds the features of one dataset at one or more checkpoints, in shards of safetensors that are memory-mapped to
be read, can be written by many processes, and survive being killed at any moment.
"""

from stepinfluence.store.codecs import NUMPY_DTYPES, STORE_DTYPES, StoreDtype, bytes_per_row, decode, encode
from stepinfluence.store.export import export
from stepinfluence.store.fold import fold, fold_manifest, fold_store
from stepinfluence.store.maintain import merge, verify
from stepinfluence.store.manifest import Manifest, SketchSpec, StoredCheckpoint, checkpoint_of
from stepinfluence.store.models import model_digest, model_fingerprint
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
