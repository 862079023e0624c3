"""Looking through what wraps a model: DistributedDataParallel, ``torch.compile`` and the like."""

from __future__ import annotations

from torch import nn

WRAPPER_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model


def canonical_name(name: str) -> str:
    """A parameter's name without wrapper components, so that wrapping a model does not change its sketches."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)
