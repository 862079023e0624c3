"""Which model a store is of: its architecture, and all of its weights."""

from __future__ import annotations

import dataclasses
import hashlib

from torch import Tensor, nn

from stepinfluence.attribution.curvature.length import Progress
from stepinfluence.attribution.features import weights_digest
from stepinfluence.capture import Capture, ExactCapture
from stepinfluence.capture.body.targets import canonical_name
from stepinfluence.store.checkpoints import StoredCheckpoint


def model_fingerprint(model: nn.Module) -> str:
    """Digest of a model's architecture as its parameters and buffers show it: names, shapes and dtypes, no values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(repr((canonical_name(name), tuple(tensor.shape), str(tensor.dtype))).encode())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Digest of every tensor of a model's state dict, by name: all parameters and all buffers that are saved.

    Buffers that are not saved (``persistent=False``) are made by the model's code, in bits that depend on the machine
    (the sines of a rotary embedding): a run pins that code and its losses instead.
    """
    held = {canonical_name(k): v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(held):
        digest.update(repr((name, str(held[name].dtype), weights_digest([held[name]]))).encode())
    return digest.hexdigest()


def checkpoint_of(
    capture: Capture | ExactCapture, name: str, eta: float, progress: Progress | str = ""
) -> StoredCheckpoint:
    """What a store tells of the weights (and the metric) that a capture's model has now."""
    space = dataclasses.replace(capture.space(), model_weights=model_digest(capture.model))
    return StoredCheckpoint(name, eta, space, progress)
