"""Which body parameters the passes of a run used, and what is to be said of those that they did not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.capture.body.sources import Source
from stepinfluence.capture.body.targets import Target
from stepinfluence.errors import BodyError

LOOKS = {
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.numpy,
    Tensor.is_nonzero, torch.is_nonzero, Tensor.nonzero, torch.nonzero, Tensor.argwhere, torch.argwhere, Tensor.unique,
    torch.unique, torch.unique_consecutive, Tensor.bincount, torch.bincount, Tensor.masked_select, torch.masked_select,
    Tensor.equal, torch.equal, Tensor.__contains__,
}  # fmt: skip
"""Functions by which a forward pass can let the values of the data decide what is run next."""


class Usage:
    """How parameters were met in one pass, or in several.

    Attributes:
        used: in the loop, with gradients, by rows of the data.
        empty: in the loop, by data without rows.
        outside: outside the loop only, where such uses are left out.
        seen: in a call without data, or without gradients, that gives values.
        looked: whether values of the data were looked at, so that they may have decided what is run.
    """

    def __init__(self) -> None:
        self.used: set[Target] = set()
        self.empty: set[Target] = set()
        self.outside: set[Target] = set()
        self.seen: set[Target] = set()
        self.looked = False

    def saw(self, func: Any, sources: Iterable[Source], result: Any) -> None:
        """A call of ``func`` in which ``sources`` met no data, or took part without gradients."""
        results = result if isinstance(result, tuple | list) else (result,)
        if func in LOOKS or any(isinstance(r, Tensor) for r in results):
            for source in sources:
                self.seen.update(source.targets)

    def add(self, other: Usage) -> None:
        """What another pass did comes to it."""
        for name in ("used", "empty", "outside", "seen"):
            getattr(self, name).update(getattr(other, name))
        self.looked |= other.looked

    def check(self, model: nn.Module, targets: Sequence[Target], *, last: bool) -> None:
        """Refuse parameters that take no part; after the last batch, warn of those that no row of the data came to.

        Before that, what no call took may still be used, where values of the data are looked at.

        Raises:
            BodyError: as said (names the parameters).
        """
        unused = [t for t in targets if t not in self.used]
        idle = [t for t in unused if t in self.empty or (self.looked and self._has_used_sibling(model, t))]
        never = [t for t in unused if t not in idle and (last or not self.looked or t in self.seen)]
        if never:
            raise self._never_used(never)
        if idle and last:
            warnings.warn(
                f"{_shown(idle)}: no row of the loader's data came to it (an expert that no token chose), so that its "
                "columns are zero for all examples",
                stacklevel=4,
            )

    def _has_used_sibling(self, model: nn.Module, target: Target) -> bool:
        """Whether the same parameter of another module was used that stands in a list beside this one's."""
        used = {t.name for t in self.used}
        parts = target.name.split(".")
        for k in range(len(parts)):
            try:
                parent = model.get_submodule(".".join(parts[:k]))
            except AttributeError:  # a wrapper's part of the name is left out
                continue
            if isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
                others = {*parent._modules, *parent._parameters} - {parts[k]}
                if any(".".join((*parts[:k], other, *parts[k + 1 :])) in used for other in others):
                    return True
        return False

    def _never_used(self, targets: Sequence[Target]) -> BodyError:
        """The error for body parameters that no pass used; it speaks of the first, and of those like it."""
        first = targets[0]
        for kind in (self.outside, self.seen):
            if first in kind:
                alike = [t for t in targets if t in kind]
                break
        else:
            kind, alike = None, [t for t in targets if t not in self.seen]
        if kind is self.outside:
            return BodyError(
                f"{_shown(alike)}: used outside the loop only, and such uses are left out (outside='ignore'); set "
                "requires_grad=False on it, or make the module that uses it part of the body"
            )
        if kind is self.seen:
            return BodyError(
                f"{_shown(alike)}: never used in the loop with gradients on: what the forward pass does with it is "
                "detached, under no_grad, or does not meet the data; set requires_grad=False on it, or run steps with "
                "gradients (training=True, where a model does so in training mode only)"
            )
        return BodyError(
            f"{_shown(alike)}: never used: no torch call of the forward pass takes it; set requires_grad=False on "
            "what takes no part, and where the data picks what is used (an expert that no token chose), give it such "
            "data or pass verify=False: its columns are then zero"
        )


def _shown(targets: Iterable[Target]) -> str:
    names = [t.name for t in targets]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
