"""Follows owners through the torch calls of a forward pass.

For every call that data takes part in, a rule tells the owners of the result from those of the operands. Rules may say
too little (*not known*), never too much: the owner of an element of the result is that of every element that gradients
reach from it. Then the owners of the losses decide: where loss ``i`` belongs to example ``i`` and to nobody else, no
gradient of another loss can have reached a row that was followed to there, and what was followed is a fact of this
batch. Where it does not, owners are found by gradients (:mod:`stepinfluence.capture.found`).

Only what comes after a tapped use can carry a gradient to it. Such tensors are *tapped*; the owners of all others
(inputs, masks, states before the loop) are mere labels, and give way where the two meet.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from stepinfluence.capture.body.sources import TensorSet, base_of
from stepinfluence.capture.body.taps import TAPS
from stepinfluence.capture.owners.intervals import NOBODY, UNKNOWN, Owners, filled, meet
from stepinfluence.capture.owners.memory import Memory


@dataclass(frozen=True)
class Part:
    """Owners of one operand, and whether gradients of tapped uses flow through it."""

    owners: Owners
    strong: bool


class Known(weakref.ref[Tensor]):
    """What is known of a tensor, as long as that is there; one small object for every result of a torch call.

    Attributes:
        key: the tensor's identity.
        owners: of its elements.
        tapped: whether it comes after a tapped use.
    """

    __slots__ = ("key", "owners", "tapped")

    key: int
    owners: Owners
    tapped: bool


Found: TypeAlias = "Owners | Sequence[Owners | None] | None"
Rule: TypeAlias = Callable[["Follower", Any, tuple[Any, ...], dict[str, Any], Any], Found]
"""``(follower, function, args, kwargs, result) -> owners`` of the result, or of each of several; None for nobody."""


class _NotStaticError(Exception):
    """A call's arguments hold tensors."""


def _static(value: Any) -> Hashable:
    """An argument as a key; two equal keys ask for the same."""
    if isinstance(value, Tensor):
        raise _NotStaticError
    if isinstance(value, slice):
        return "slice", _static(value.start), _static(value.stop), _static(value.step)
    if isinstance(value, list | tuple):
        return tuple(_static(v) for v in value)
    return value if isinstance(value, Hashable) else repr(value)


class Follower:
    """Owners of the tensors of one forward pass, by identity.

    Args:
        memory: what is known from earlier passes over as many examples.

    Attributes:
        batch_size: examples of the batch; None: not known, and nothing is followed.
        in_use: whether the call being followed is one in which parameters met data.
        calls: names of functions without a rule that tapped data went through.
        known: owners of tensors, by their identity.
        nobodys: results that require grad and that nobody has a part in.
    """

    def __init__(self, rules: dict[Any, Rule], batch_size: int | None, memory: Memory) -> None:
        self._rules = rules
        self.batch_size = batch_size
        self.memory = memory
        self.in_use = False
        self.calls: set[str] = set()
        self.known: dict[int, Known] = {}
        self.nobodys = TensorSet()
        self._memo: dict[Hashable, tuple[Any, Any]] = {}
        pop = self.known.pop
        self._gone: Callable[[Any], object] = lambda known: pop(known.key, None)

    # ------------------------------------------------------------------------------------------------------------

    def note(self, tensor: Tensor, owners: Owners, *, tapped: bool) -> None:
        if owners.along is not None:  # one object for all that say the same, so that what is remembered of it is found
            owners = self.memory.one_of(owners)
        self.note_lasting(tensor, owners, tapped)

    def note_lasting(self, tensor: Tensor, owners: Owners, tapped: bool) -> None:
        """Note owners that the memory gave."""
        known = Known(tensor, self._gone)
        known.key = key = id(tensor)
        known.owners, known.tapped = owners, tapped
        self.known[key] = known

    def forget(self, tensor: Tensor) -> None:
        self.known.pop(id(tensor), None)

    def stand_in(self, before: Tensor, after: Tensor) -> None:
        """Take the owners of a tensor for those of another one with the same values."""
        self.meets(before)
        if (found := self.known.get(id(before))) is not None:
            self.note(after, found.owners, tapped=found.tapped)
        elif self.nobodys.has_id(id(before)):
            self.nobodys.add(after)

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self.known

    def meets(self, operand: Tensor) -> None:
        """Data that takes part in a call: where it carries gradients and was made out of sight, nothing is known."""
        node = operand.grad_fn
        if node is None:
            return
        known = self.knows(operand) or self.nobodys.has_id(id(operand))
        # What a custom function does on its way back is not what its forward shows.
        if not known or (isinstance(node, BackwardCFunction) and not isinstance(node, TAPS)):
            self.unknown(operand)

    def owners(self, tensor: Tensor) -> Owners | None:
        found = self.known.get(id(tensor))
        return None if found is None else found.owners

    def part(self, value: object) -> Part | None:
        """Owners of an operand; None where nobody has a part in it."""
        if not isinstance(value, Tensor) or (found := self.known.get(id(value))) is None:
            return None
        return Part(found.owners, found.tapped and value.requires_grad)

    def unknown(self, tensor: Tensor) -> None:
        """From now on nothing is known of a tensor."""
        self.note(tensor, self.not_known(tensor), tapped=True)

    def not_known(self, tensor: Tensor) -> Owners:
        return self.memory.same(tensor.shape, UNKNOWN, tensor.device)

    def nobody(self, tensor: Tensor) -> Owners:
        return self.memory.same(tensor.shape, NOBODY, tensor.device)

    def combine(self, parts: Sequence[Part | None], shape: Sequence[int]) -> Owners | None:
        """What operands give that meet in a tensor of ``shape``; strong ones first."""
        given = [p for p in parts if p is not None]
        if not given:
            return None
        if len(given) == 1:
            return given[0].owners.broadcast(shape)
        key = ("meet", tuple((id(p.owners), p.strong) for p in given), tuple(shape))
        lasting = all(self.memory.lasts(id(p.owners)) for p in given)
        memo = self.memory.made if lasting else self._memo
        if (held := memo.get(key)) is not None:
            return held[1]  # type: ignore[no-any-return]
        strong = [p.owners for p in given if p.strong]
        weak = [p.owners for p in given if not p.strong]
        if not strong or not weak:
            result = meet(strong or weak, shape)
        else:
            result = filled(meet(strong, shape), meet(weak, shape))
        if lasting:
            self.memory.keep(result)
        memo[key] = (given, result)
        return result

    def remembered(self, func: Any, owners: Owners, arguments: Any, make: Callable[[], Any]) -> Any:
        """``make()``, once for each function, owners and arguments without tensors."""
        try:
            key = (func, id(owners), _static(arguments))
        except _NotStaticError:
            return make()
        lasting = self.memory.lasts(id(owners))
        memo = self.memory.made if lasting else self._memo
        if (held := memo.get(key)) is None:
            held = memo[key] = (owners, make())
            if lasting:
                self.memory.keep(held[1])
        return held[1]

    # ------------------------------------------------------------------------------------------------------------

    def has_rule(self, func: Any) -> bool:
        return func in self._rules

    def follow(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        result: Any,
        operands: Sequence[Tensor],
        *,
        in_place: bool,
        use: bool = False,
    ) -> None:
        """Note the owners of what ``func`` gave.

        Args:
            operands: all its tensors that are data.
            in_place: whether it wrote to its first argument, or to ``out``.
            use: whether parameters met data in it.
        """
        if in_place:
            result = kwargs["out"] if isinstance(kwargs.get("out"), Tensor) else args[0]
        results = result if isinstance(result, tuple | list) else (result,)
        if not any(isinstance(r, Tensor) for r in results):
            return
        if func.__name__ in ("__get__", "__set__") and not self.has_rule(func) and func.__self__.__name__ != "data":
            return  # an attribute (``_base``, ``grad``, ``_backward_hooks``): no new values
        parts = [p for p in map(self.part, operands) if p is not None]
        if not parts:
            for value in results:
                if isinstance(value, Tensor) and value.requires_grad:
                    self.nobodys.add(value)
            return
        tapped = use or any(p.strong for p in parts)
        if not self.has_rule(func) and tapped and any(isinstance(r, Tensor) and r.requires_grad for r in results):
            self.calls.add(getattr(func, "__name__", str(func)))
        self.in_use = use
        rule: Rule = self._rules.get(func, _no_rule)
        found = rule(self, func, args, kwargs, result)
        if found is None or isinstance(found, Owners):
            found = [found] * len(results)
        for value, owners in zip(results, found, strict=True):
            if not isinstance(value, Tensor):
                continue
            if owners is not None and owners.shape != tuple(value.shape):
                owners = self.not_known(value)  # a form of the call that its rule does not know
            if use and owners is not None and owners.hi is not owners.lo:
                owners = self.remembered("anybody", owners, (), owners.anybody)
            if in_place:
                self._written(value, owners, tapped)
            elif owners is not None:
                self.note(value, owners, tapped=tapped)

    def after(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> Owners | None:
        """Owners of the result of a call by its rule, without noting them."""
        rule: Rule = self._rules.get(func, _no_rule)
        found = rule(self, func, args, kwargs, result)
        return found if found is None or isinstance(found, Owners) else found[0]

    def _written(self, tensor: Tensor, owners: Owners | None, tapped: bool) -> None:
        """A tensor, and with it all that shares its memory, has been changed in place."""
        before = self.owners(tensor)
        if owners is None:
            self.forget(tensor)
            self.nobodys.add(tensor)
        else:
            self.note(tensor, owners, tapped=tapped)
        same = before is not None and owners is not None and _alike(before, owners)
        if same and not tapped:
            return
        base = base_of(tensor)
        sharing = [other for ref in list(self.known.values()) if (other := ref()) is not None]
        for other in (*sharing, *self.nobodys.held(), base):
            if other is not tensor and base_of(other) is base:
                owners = self.owners(other) if same else None
                self.note(other, self.not_known(other) if owners is None else owners, tapped=True)


def _no_rule(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    results = result if isinstance(result, tuple | list) else (result,)
    return [f.not_known(r) if isinstance(r, Tensor) and (r.requires_grad or f.in_use) else None for r in results]


def _alike(one: Owners, other: Owners) -> bool:
    return one is other or (one.along is not None and one.along == other.along and one.shape == other.shape)


def arguments(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> types.SimpleNamespace:
    """A call's arguments by name; None for those not given."""
    given = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | kwargs
    return types.SimpleNamespace(**given)
