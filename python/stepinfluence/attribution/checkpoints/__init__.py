"""Reading checkpoints: tensors and numbers only, never arbitrary pickles.

Understood are files and folders as training frameworks leave them (:mod:`.reading`), fitted to a model whose names may
have other prefixes, whose tied weights are stored once, or of which only adapters were saved (:mod:`.fitting`).
"""

from stepinfluence.attribution.checkpoints.checkpoint import Checkpoint, Etas, resolve_etas
from stepinfluence.attribution.checkpoints.reading import PathLike, Reader, is_checkpoint, load_checkpoint

__all__ = ["Checkpoint", "Etas", "PathLike", "Reader", "is_checkpoint", "load_checkpoint", "resolve_etas"]
