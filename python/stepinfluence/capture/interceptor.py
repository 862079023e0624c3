"""Sees every torch call of a forward pass and taps those in which a target parameter meets the data.

Parameters are recognised by their *use*, not by the type of the module that holds them: custom modules, fused
projections, tied weights and functional calls are all the same here. For a call with target parameters (or tensors
computed from them) among its arguments, the first of these that applies decides:

1. no data takes part: the result is batch-free, its provenance is remembered;
2. a rule of :mod:`stepinfluence.capture.uses` knows the operation;
3. the function is written in Python on top of others (``F.multi_head_attention_forward``): its parts are looked at;
4. any other operation: the parameter is expanded per example and the operation is mapped over micro-batches of one;
5. an :class:`UnsupportedUseError` names parameter and operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from stepinfluence.capture.calls import (
    EXPANSIONS,
    GRADIENT_TAKERS,
    LOOKED_INTO,
    OUTSIDE,
    STRUCTURE_FACTORIES,
    changes_in_place,
    in_custom_function,
    undispatched,
)
from stepinfluence.capture.owners import RULES as OWNER_RULES
from stepinfluence.capture.owners import Follower, Owners, meet
from stepinfluence.capture.recorder import SketchRecorder
from stepinfluence.capture.rows import Pass, Use, gains_examples
from stepinfluence.capture.sources import Provenance, Source
from stepinfluence.capture.steps import StepTracker, in_backward
from stepinfluence.capture.taps import Receive, has_tap, tap_expanded, tap_output
from stepinfluence.capture.targets import Target
from stepinfluence.capture.usage import LOOKS, Usage
from stepinfluence.errors import BodyError, UnsupportedUseError


class _Operands:
    """The tensors among a call's arguments, sorted by what they are."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.data: list[Tensor] = []
        self.has_constant = False
        self.only_doubtful = True  # no data that surely is data, see Provenance


def nested(where: str) -> UnsupportedUseError:
    """The error for tensors whose examples have lengths of their own."""
    return UnsupportedUseError(
        f"model: a nested (jagged) tensor, {where}, cannot be followed; pass padded tensors with a mask"
    )


def _ignored(_grad: Tensor, _saved: tuple[Tensor, ...]) -> None:
    """Receives the gradients of uses that are left out."""


class Interceptor(TorchFunctionMode):
    """The function mode of one capture; ``rules`` maps torch functions to how their uses are tapped.

    Attributes:
        batch_size: examples of the batch, None if not known yet.
        batch_dim: the dimension that holds them.
        doubt: whether tensors made without data that have the batch's size are taken for states of the examples; else
            they are constants.
        doubted: whether there was such a tensor, and a parameter met it.
        usage: which targets this forward pass used, and how.
        uses: all uses of this forward pass.
        labelled: whether some of the batch's tensors say which example is which.
        sink: what gradients are handed to: the recorder, or what finds their owners.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[Target],
        tracker: StepTracker,
        recorder: SketchRecorder,
        *,
        outside: str,
        rules: dict[Any, Callable[..., Any]],
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        self.sink: Any = recorder
        self._provenance = Provenance(model, targets)
        self._tracker = tracker
        self._outside = outside
        self._rules = rules
        device = targets[0].parameter.device
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.batch_dim = batch_dim
        self.follower = Follower(OWNER_RULES)
        self.reset(None, (), doubt=True)

    def reset(self, batch_size: int | None, inputs: Sequence[Tensor], *, doubt: bool) -> None:
        """Get ready for a forward pass.

        Args:
            batch_size: examples of the batch; None: not known yet.
            inputs: the batch's tensors.
            doubt: see the class.
        """
        self._provenance.reset()
        self.follower.reset(batch_size)
        self.batch_size = batch_size
        self.doubt, self.doubted = doubt, False
        self.usage = Usage()
        self._without_rows = False
        self.uses: list[Use] = []
        self.labelled = False
        self.shared = Pass()
        # Decisions that a recomputation has to take as they were taken: it cannot follow owners.
        self._row_dims: dict[Any, list[int | None]] = {}
        self._alike: dict[Any, bool] = {}
        for tensor in inputs if batch_size is not None else ():
            lies = tensor.dim() > self.batch_dim and tensor.shape[self.batch_dim] == batch_size
            if lies and not self._provenance.has(tensor):
                owners = Owners.along_dim(tensor.shape, self.batch_dim, tensor.device)
                self.follower.note(tensor, owners, tapped=False)
                self.labelled = True

    # ------------------------------------------------------------------------------------------------------------
    # What rules need

    def detached(self, value: Any) -> Any:
        """A parameter as autograd does not see it; anything else as it is."""
        return value.detach() if self.source(value) is not None else value

    def without_capture(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The call with its sources detached."""
        args, kwargs = pytree.tree_map(self.detached, (args, kwargs))
        return func(*args, **kwargs)

    def source(self, value: object) -> Source | None:
        return self._provenance.source_of(id(value))

    def is_constant(self, value: object) -> bool:
        return self._provenance.constants.has_id(id(value))

    @property
    def example_dims(self) -> tuple[int, ...]:
        """The dimensions in which a tensor made without data may hold the examples, likeliest first."""
        return (self.batch_dim,) if self.batch_dim == 0 else (self.batch_dim, 0)

    def owners(self, data: Tensor, trailing: int = 0) -> Owners | None:
        """Owners of the leading dimensions of an operand, all but the last ``trailing``; None: not known."""
        return self.lead_owners(data, range(data.dim() - trailing))

    def owners_of_columns(self, data: Tensor) -> Owners | None:
        """Owners of the columns of matrices ``(*lead, k, n)``: of ``(*lead, n)``; None: not known."""
        return self.lead_owners(data, [*range(data.dim() - 2), data.dim() - 1])

    def lead_owners(self, data: Tensor, lead: Sequence[int]) -> Owners | None:
        """Owners of some dimensions of an operand, in that order, where all along the others meets; None: not
        known."""
        if self.batch_size is None or in_backward() or (owners := self.follower.owners(data)) is None:
            return None

        def make() -> Owners:
            others = [d for d in range(data.dim()) if d not in lead]
            small = owners.reduced(others).squeezed(others)
            kept = sorted(lead)
            order = [kept.index(d) for d in lead]
            if order == sorted(order):
                return small
            found = small.map([small.shape[k] for k in order], lambda ends, _: ends.permute(order))
            found.along = None if small.along is None else order.index(small.along)
            return found

        return self._sure(self.follower.remembered("lead of", owners, tuple(lead), make))

    def alike_along(self, data: Tensor, dim: int) -> bool:
        """Whether it is known that owners do not depend on the index along a dimension of an operand."""
        if in_backward():
            return self._alike.get((tuple(data.shape), dim), True)
        owners = self.follower.owners(data)
        alike = (
            owners is not None
            and not owners.varies(dim)
            and not (owners.one_for_all and bool(owners.lo.flatten() < owners.hi.flatten()))
        )
        self._alike[tuple(data.shape), dim] = alike
        return alike

    def owners_after(self, func: Any, args: tuple[Any, ...], result: Tensor) -> Owners | None:
        """Owners of what a call without parameters would give; None: not known."""
        if self.batch_size is None or in_backward():
            return None
        return self._sure(self.follower.after(func, args, {}, result))

    def joint_owners(self, operands: Sequence[Any], shape: Sequence[int]) -> Owners | None:
        """Owners of what operands give that are broadcast to ``shape``; None: not known."""
        if self.batch_size is None or in_backward():
            return None
        return self._sure(self.follower.combine([self.follower.part(v) for v in operands], shape))

    def _sure(self, owners: Owners | None) -> Owners | None:
        """Owners of rows that a parameter meets: what is nobody's may from now on be anybody's."""
        if owners is None or owners.hi is owners.lo:
            return owners
        return self.follower.remembered("anybody", owners, (), owners.anybody)  # type: ignore[no-any-return]

    def row_dims(self, func: Any, leaves: Sequence[Any]) -> tuple[list[int | None], Owners | None]:
        """For each argument of a call the dimension in which its rows lie (None: it is the same for all), and their
        owners ``(rows,)`` (None: not known)."""
        data = [isinstance(v, Tensor) and self.source(v) is None and not self.is_constant(v) for v in leaves]
        key = (func, tuple(tuple(v.shape) if isinstance(v, Tensor) else None for v in leaves))
        if in_backward():  # as in the first forward pass: owners are not followed again
            return self._row_dims.get(
                key, [0 if d and v.dim() else None for v, d in zip(leaves, data, strict=True)]
            ), None
        dims: list[int | None] = []
        owners: list[Owners] = []
        for value, is_data in zip(leaves, data, strict=True):
            part = self.follower.part(value) if is_data else None
            if not is_data or not value.dim() or (part is None and self.batch_size is not None):
                dims.append(None)
                continue
            whole = None if part is None else part.owners
            varying = [] if whole is None else [d for d in range(value.dim()) if whole.varies(d)]
            dims.append(varying[0] if varying else 0)
            if whole is not None:
                others = [d for d in range(value.dim()) if d != dims[-1]]
                owners.append(whole.reduced(others).squeezed(others))
        if len({v.shape[d] for v, d in zip(leaves, dims, strict=True) if d is not None}) > 1:
            dims = [d if d is None or v.shape[d] != 1 else None for v, d in zip(leaves, dims, strict=True)]
        self._row_dims[key] = dims
        joint = [o for o in owners if o.shape == owners[0].shape]
        return dims, self._sure(meet(joint, joint[0].shape)) if joint and self.batch_size is not None else None

    def use(self, operation: Callable[..., Any], owners: Owners | None, *used: Source | None) -> Use:
        """A use of these sources that is happening now, on rows of these owners."""
        names = ", ".join(dict.fromkeys(s.name for s in used if s is not None))
        called = getattr(operation, "__name__", str(operation)).strip("_")
        use = Use(names, self._step(operation, *used), owners, self.shared, called)
        if not in_backward():  # recomputation: the nodes made now are thrown away, only their saved tensors count
            self.uses.append(use)
        return use

    def _step(self, operation: Callable[..., Any], *used: Source | None) -> int:
        """The loop step of a use of these sources that is happening now; ``OUTSIDE`` if it is to be left out."""
        if in_backward():
            return 0
        step = self._tracker.current
        targets = [target for source in used if source is not None for target in source.targets]
        if step is None and self._outside == "error":
            raise BodyError(
                f"{targets[0].name}: used outside the loop body (by {resolve_name(operation) or operation.__name__}); "
                "pass outside='ignore' to leave such uses out of the influence, or make their module part of the body"
            )
        if step is None:
            self.usage.outside.update(targets)
            return OUTSIDE
        (self.usage.empty if self._without_rows else self.usage.used).update(targets)
        return step

    def tap(self, output: Tensor, use: Use, receive: Receive, *saved: Tensor) -> Tensor:
        """``output``, with its gradient and ``saved`` handed to ``receive``.

        Uses that are left out (their step is ``OUTSIDE``) are tapped all the same: a recomputation of activation
        checkpointing does not know them, and must save the same tensors.
        """
        return tap_output(output, self.anchor, self._received(use, receive), *saved)

    def tap_expanded(self, source: Source, use: Use, receive: Receive, shape: tuple[int, ...]) -> Tensor:
        """``source`` expanded to ``shape``, with the gradient of that shape handed to ``receive``."""
        return tap_expanded(source.tensor.detach(), self.anchor, self._received(use, receive), shape)

    def _received(self, use: Use, receive: Receive) -> Receive:
        """``receive``, for gradients of the capture's own backward pass alone: a model may take gradients of its own
        while that runs (implicit differentiation), which are no gradients of the losses."""
        if use.step == OUTSIDE:
            return _ignored
        shared = self.shared

        def received(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
            if torch._C._current_graph_task_id() == shared.graph_task:
                receive(grad, saved)

        return received

    def look_inside(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function of torch that is written in Python so that the calls inside it are seen, too."""
        body = undispatched(func)
        if body is None:
            return NotImplemented
        with self:
            return body(*args, **kwargs)

    def unsupported(self, sources: list[Source], func: Callable[..., Any], why: str) -> UnsupportedUseError:
        names = ", ".join(dict.fromkeys(s.name for s in sources))
        return UnsupportedUseError(
            f"{names}: its use in {resolve_name(func) or getattr(func, '__name__', func)} cannot be captured ({why}); "
            "rewrite it with a linear, matmul, embedding, normalisation or elementwise operation, or set "
            "requires_grad=False on the parameter to leave it out"
        )

    # ------------------------------------------------------------------------------------------------------------
    # Dispatch

    def _scan(self, values: Any, found: _Operands) -> None:
        for value in values:
            if isinstance(value, Tensor):
                key, known = id(value), self._provenance
                source = known.source_of(key)
                if source is not None:
                    found.sources.append(source)
                elif known.constants.has_id(key):
                    found.has_constant = True
                else:
                    found.data.append(value)
                    found.only_doubtful &= known.doubtful.has_id(key)
            elif type(value) in (tuple, list):
                self._scan(value, found)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _Operands()
        self._scan(args, found)
        if kwargs:
            self._scan(kwargs.values(), found)
        self.usage.looked |= func in LOOKS and bool(found.data)
        if func in GRADIENT_TAKERS:
            if in_backward() or any(tensor is self.anchor for tensor in kwargs.get("inputs") or ()):
                # The capture's own backward pass, or one within it (a hook's), with this mode on: a recomputation must
                # tap as the forward did.
                return self.look_inside(func, args, kwargs)
            self._refuse_inner_gradients(func, args)
        if not found.sources or not torch.is_grad_enabled():
            if found.sources and not in_backward() and in_custom_function():
                raise self.unsupported(
                    found.sources,
                    func,
                    "inside a custom autograd function; checkpointing must have use_reentrant=False, and a solver of "
                    "differential equations must be differentiated through, without the adjoint method",
                )
            return self._without_sources(func, args, kwargs, found)
        if not found.data:
            return self.batch_free(func, args, kwargs, found.sources)
        if not in_backward():
            if torch._C._functorch.maybe_current_level() is not None:
                raise self.unsupported(found.sources, func, "inside torch.func or torch.vmap")
            self._give_owners(found)
        outer, self._without_rows = self._without_rows, all(t.numel() == 0 for t in found.data)
        try:
            result = self._tapped(func, args, kwargs)
        finally:
            self._without_rows = outer
        if not in_backward() and self.batch_size is not None:
            self._follow_use(func, args, kwargs, result, found)
        return result

    def _without_sources(self, func: Any, args: Any, kwargs: Any, found: _Operands) -> Any:
        following = self.batch_size is not None and not in_backward() and bool(found.data)
        if following:
            for operand in found.data:
                self.follower.meets(operand)
            if not self.follower.has_rule(func) and getattr(func, "__module__", None) in LOOKED_INTO:
                result = self.look_inside(func, args, kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_nested and not in_backward():
            raise nested(f"the result of {resolve_name(func) or func.__name__}")
        if found.sources:
            self.usage.saw(func, found.sources, result)
        if found.data:
            self._note_data(func, args, kwargs, result, found)
            if following:
                in_place = changes_in_place(func, kwargs)
                self.follower.follow(func, args, kwargs, result, found.data, in_place=in_place)
        else:
            self._note_constants(func, args, result, bool(found.sources) or found.has_constant)
        return result

    def _tapped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call in which sources meet data."""
        rule = self._rules.get(func)
        result = NotImplemented if rule is None else rule(self, func, args, kwargs)
        if result is NotImplemented:
            result = self.look_inside(func, args, kwargs)
        return self._rules["any"](self, func, args, kwargs) if result is NotImplemented else result

    def _give_owners(self, found: _Operands) -> None:
        """Data that meets a parameter: what has no owners gets those that its shape suggests. The losses will tell
        whether that was right."""
        if self.batch_size is None:
            return
        follower = self.follower
        for tensor in found.data:
            follower.meets(tensor)
            part = follower.part(tensor)
            if part is not None and (part.strong or not part.owners.one_for_all or part.owners.lo == part.owners.hi):
                continue
            owners = self._suggested(tensor)
            doubtful = part is None and self._provenance.doubtful.has_id(id(tensor))
            self.doubted |= doubtful and owners is not None
            if owners is not None:
                follower.note(tensor, owners, tapped=False)
        if all(follower.part(tensor) is None for tensor in found.data):
            follower.note(found.data[0], follower.not_known(found.data[0]), tapped=False)

    def _suggested(self, tensor: Tensor) -> Owners | None:
        """Owners of a tensor by its shape alone."""
        size, shape = self.batch_size, tensor.shape
        assert size is not None
        dims = [k for k in range(max(1, tensor.dim() - 1)) if k < tensor.dim() and shape[k] == size]
        if dims:
            dim = self.batch_dim if self.batch_dim in dims else dims[0]
            return Owners.along_dim(shape, dim, tensor.device)
        if tensor.dim() > 1 and shape[0] and shape[0] % size == 0:
            numbers = torch.arange(shape[0], device=tensor.device).reshape(-1, *(1,) * (tensor.dim() - 1))
            ends = numbers // (shape[0] // size) if self.batch_dim == 0 else numbers % size
            return Owners(shape, ends, ends)
        return None

    def _follow_use(self, func: Any, args: Any, kwargs: Any, result: Any, found: _Operands) -> None:
        results = result if isinstance(result, tuple | list) else (result,)
        if any(self.source(r) is not None for r in results):
            return  # the data only picked a part of the parameter
        if all(self.follower.knows(r) for r in results if isinstance(r, Tensor)) and not changes_in_place(func, kwargs):
            return  # its parts have been followed
        self.follower.follow(func, args, kwargs, result, found.data, in_place=changes_in_place(func, kwargs), use=True)

    def _refuse_inner_gradients(self, func: Any, args: Any) -> None:
        outputs = args[0] if args and isinstance(args[0], tuple | list) else args[:1]
        if has_tap(outputs):
            raise UnsupportedUseError(
                f"model: takes gradients through the loop body in its forward pass ({func.__qualname__}); what the "
                "body's parameters do to those gradients cannot be captured, use ExactCapture"
            )

    def _is_batch_shaped(self, value: Tensor) -> bool:
        if not self.doubt or value.dim() == 0:
            return False
        if self.batch_size is None:
            return True
        return any(value.dim() > k and value.shape[k] == self.batch_size for k in self.example_dims)

    def _note_data(self, func: Any, args: Any, kwargs: Any, result: Any, found: _Operands) -> None:
        """Tell data from constants in what an operation without target parameters gives."""
        known = self._provenance
        if found.has_constant and changes_in_place(func, kwargs):
            known.constants.discard_sharing(kwargs["out"] if kwargs.get("out") is not None else args[0])
        if found.only_doubtful:
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor):
                    (known.doubtful if self._is_batch_shaped(value) else known.constants).add(value)

    def _note_constants(self, func: Any, args: Any, result: Any, from_constants: bool) -> None:
        known = self._provenance
        for value in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(value, Tensor):
                continue
            if from_constants:
                # A table of positions, one row for all examples, becomes data where it gets a row for each.
                data = (
                    self.doubt
                    and func in EXPANSIONS
                    and (gains_examples(args[0].shape, value.shape, self.batch_size, self.example_dims) is not None)
                )
            else:
                data = func not in STRUCTURE_FACTORIES and self._is_batch_shaped(value)
            (known.doubtful if data else known.constants).add(value)

    def batch_free(self, func: Any, args: Any, kwargs: Any, sources: list[Source]) -> Any:
        """A call in which no data takes part: what it gives is a source, too."""
        if self.batch_size is not None and self.doubt and len(sources) == 1:
            expanded = self._rules["expand"](self, func, args, kwargs)
            if expanded is not NotImplemented:
                return expanded
        # These graphs are walked once per example: they are kept out of activation checkpointing.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            result = func(*args, **kwargs)
        self.usage.saw(func, sources, result)
        if changes_in_place(func, kwargs):
            self._provenance.changed_in_place(kwargs["out"] if kwargs.get("out") is not None else args[0], sources)
            return result
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and self.source(value) is None:
                self._provenance.add_derived(value, sources)
        return result
