"""What a torch call does to owners is worked out once, and recalled wherever all that decides it is the same again.

For most calls that is their function, its arguments that are no tensors, and of each tensor its shape, dtype and
owners, whether gradients flow through it, and what else is known of it. All of it is looked at before each call;
whatever is new, or decided by the values of a tensor (an index, a mask), goes the long way through the rules.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F

from stepinfluence.capture.body.sources import Provenance
from stepinfluence.capture.body.steps import in_backward
from stepinfluence.capture.body.taps import TAPS
from stepinfluence.capture.owners import ALONE, BY_SHAPE, Follower, Owners
from stepinfluence.capture.owners.calls import GROUPED, changes_in_place
from stepinfluence.capture.uses.usage import LOOKS

_IN_PLACE = {F.relu: 1, F.silu: 1, F.mish: 1, F.dropout: 3}
"""Where those that may write to their first argument take the argument that says so."""

_WRITTEN_IN_PYTHON = (
    *_IN_PLACE, F.softmax, F.log_softmax, F.glu, F.layer_norm, F.rms_norm, F.cross_entropy, F.mse_loss, Tensor.split,
    torch.split,
)  # fmt: skip
"""Functions without a rule, whose calls of others depend on nothing but shapes and numbers."""

RECALLED = {
    f for f in (*BY_SHAPE, *_WRITTEN_IN_PYTHON) if f not in LOOKS and f not in GROUPED and not changes_in_place(f, {})
}
"""Functions whose outcome can be recalled."""

_AS_THEY_ARE = frozenset((int, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.memory_format))
_CONSTANT, _DOUBTFUL, _NOBODYS, _TAPPED, _GRAD, _SOURCE = 1, 2, 4, 8, 16, 32


class _OneResult:
    """What is known of one result of a call."""

    __slots__ = ("kind", "owners", "shape", "tapped")

    def __init__(self, shape: torch.Size, kind: int, owners: Owners | None, tapped: bool) -> None:
        self.shape, self.kind, self.owners, self.tapped = shape, kind, owners, tapped


Outcome: TypeAlias = "_OneResult | tuple[_OneResult | None, ...]"
"""Of a call with one result, or of each of several; None for what is no tensor."""


class Recall:
    """For one forward pass.

    Args:
        provenance, follower: what is known of its tensors.

    Attributes:
        outcome: of the calls with a key, as far as it is known.
    """

    def __init__(self, provenance: Provenance, follower: Follower) -> None:
        self._provenance, self._follower = provenance, follower
        self._outcomes: dict[Hashable, Outcome] = follower.memory.outcomes
        self.outcome = self._outcomes.get
        # Asked for every operand of every torch call of the model: no indirection.
        self._known, self._lasts = follower.known, follower.memory.lasts
        self._source_of, self._is_nobodys = provenance.source_of, follower.nobodys.has_id
        self._is_constant, self._is_doubtful = provenance.constants.has_id, provenance.doubtful.has_id

    def key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """All that decides the outcome of a call, with whether sources take part in it first; None where that is more
        than a key can hold."""
        if func not in RECALLED or "out" in kwargs or in_backward():
            return None
        at = _IN_PLACE.get(func)
        if at is not None and (kwargs.get("inplace") or any(args[at : at + 1])):
            return None
        parts: list[Any] = [func, torch.is_grad_enabled()]
        found = self._sign(args, parts)
        if found is not None and kwargs:
            parts.extend(kwargs)
            more = self._sign(kwargs.values(), parts)
            found = None if more is None else (found[0] + more[0], found[1] + more[1])
        if found is None or (found[1] > 1 and func in ALONE):
            return None
        return (found[0] > 0, *parts)

    def _sign(self, values: Iterable[Any], parts: list[Any]) -> tuple[int, int] | None:
        """Add values to a key; gives the number of sources, and of tensors, among them."""
        sources = tensors = 0
        for value in values:
            kind = type(value)
            if kind in _AS_THEY_ARE:
                parts.append(value)
            elif isinstance(value, Tensor):
                tensors += 1
                is_source = self._sign_tensor(value, parts)
                if is_source is None:
                    return None
                sources += is_source
            elif kind is float:
                parts.append(float)  # no rule looks at it
            elif kind is bool:
                parts.append("yes" if value else "no")  # which are 1 and 0 as well
            elif kind is tuple or kind is list or kind is torch.Size:
                parts.append((kind, len(value)))
                inside = self._sign(value, parts)
                if inside is None:
                    return None
                sources += inside[0]
                tensors += inside[1]
            elif kind is slice:
                parts.append(slice)
                if self._sign((value.start, value.stop, value.step), parts) != (0, 0):
                    return None
            else:
                return None
        return sources, tensors

    def _sign_tensor(self, value: Tensor, parts: list[Any]) -> bool | None:
        """Add a tensor to a key; gives whether it is a source, None where it cannot be recalled."""
        place, state, owner = id(value), 0, None
        known = self._known.get(place)
        if known is not None:
            owner = id(known.owners)
            if not self._lasts(owner):
                return None
            if known.tapped:
                state = _TAPPED
        elif self._is_nobodys(place):
            state = _NOBODYS
        if self._source_of(place) is not None:
            state |= _SOURCE
        if self._is_constant(place):
            state |= _CONSTANT
        elif self._is_doubtful(place):
            state |= _DOUBTFUL
        if value.requires_grad:
            state |= _GRAD
            node = value.grad_fn
            if node is not None and not state & (_SOURCE | _CONSTANT):
                # See Follower.meets: made out of sight, or by a custom function.
                if known is None and not state & _NOBODYS:
                    return None
                if isinstance(node, BackwardCFunction) and not isinstance(node, TAPS):
                    return None
        parts += (owner, state, value.shape, value.dtype)
        return state & _SOURCE != 0

    def learn(self, key: tuple[Any, ...], args: tuple[Any, ...], result: Any) -> None:
        """Keep what is known, after a call, of what it gave."""
        found: list[_OneResult | None] = []
        for value in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(value, Tensor):
                found.append(None)
                continue
            one = self._known_of(value)
            passed_on = any(value is a for a in args)
            if self._provenance.source_of(id(value)) is not None or (passed_on and one.kind & _DOUBTFUL):
                return  # not what this call made of it
            found.append(one)
        single = found[0] if isinstance(result, Tensor) else None
        self._outcomes[key] = tuple(found) if single is None else single

    def _known_of(self, value: Tensor) -> _OneResult:
        place, provenance, follower = id(value), self._provenance, self._follower
        kind = (
            _CONSTANT * provenance.constants.has_id(place)
            | _DOUBTFUL * provenance.doubtful.has_id(place)
            | _NOBODYS * follower.nobodys.has_id(place)
        )
        known = follower.known.get(place)
        if known is None:
            return _OneResult(value.shape, kind, None, False)
        follower.memory.keep(known.owners)
        return _OneResult(value.shape, kind, known.owners, known.tapped)

    def apply(self, outcome: Outcome, result: Any) -> bool:
        """Note what is known of the results of a call; False where they are not of the kind that it gave before."""
        if type(outcome) is _OneResult:
            if not isinstance(result, Tensor) or result.shape != outcome.shape:
                return False
            self._note(outcome, result)
            return True
        assert isinstance(outcome, tuple)
        values = result if isinstance(result, tuple | list) else (result,)
        if len(values) != len(outcome):
            return False
        for value, one in zip(values, outcome, strict=True):
            if (one is not None) != isinstance(value, Tensor) or (one is not None and value.shape != one.shape):
                return False
        for value, one in zip(values, outcome, strict=True):
            if one is not None:
                self._note(one, value)
        return True

    def _note(self, one: _OneResult, value: Tensor) -> None:
        if one.owners is not None:
            self._follower.note_lasting(value, one.owners, one.tapped)
        if one.kind:
            if one.kind & _CONSTANT:
                self._provenance.constants.add(value)
            if one.kind & _DOUBTFUL:
                self._provenance.doubtful.add(value)
            if one.kind & _NOBODYS:
                self._follower.nobodys.add(value)
