"""Sees every torch call of a forward pass and taps those in which a target parameter meets the data.

Parameters are recognised by their *use*, not by the type of the module that holds them: custom modules, fused
projections, tied weights and functional calls are all the same here. For a call with target parameters (or tensors
computed from them) among its arguments, the first of these that applies decides:

1. no data takes part: the result is batch-free, its provenance is remembered;
2. a rule of :mod:`stepinfluence.capture.uses.rules` knows the operation;
3. the function is written in Python on top of others (``F.multi_head_attention_forward``): its parts are looked at;
4. any other operation: the parameter is expanded per example and the operation is mapped over micro-batches of one;
5. an :class:`UnsupportedUseError` names parameter and operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from stepinfluence.capture.body.sources import Provenance, Source, tensors_in
from stepinfluence.capture.body.steps import in_backward
from stepinfluence.capture.body.taps import Receive, has_tap, tap_expanded, tap_output
from stepinfluence.capture.owners import Owners
from stepinfluence.capture.owners.calls import (
    CONSTRUCTORS,
    EXPANSIONS,
    FACTS,
    GRADIENT_TAKERS,
    LOOKED_INTO,
    OF_FIRST,
    OUTSIDE,
    STRUCTURE_FACTORIES,
    changes_in_place,
    in_custom_function,
    undispatched,
)
from stepinfluence.capture.owners.rows import Pass, Use, gains_examples
from stepinfluence.capture.uses.operands import Operands, in_transform, plain
from stepinfluence.capture.uses.ownership import Ownership
from stepinfluence.capture.uses.recall import Recall
from stepinfluence.capture.uses.refusals import constants_only, inner_gradients, used_outside
from stepinfluence.capture.uses.sinks import GradientSink
from stepinfluence.capture.uses.tapping import Tapping, nested
from stepinfluence.capture.uses.usage import LOOKS, Usage
from stepinfluence.errors import UnsupportedUseError
from stepinfluence.shards import is_sharded


def _ignored(_grad: Tensor, _saved: tuple[Tensor, ...]) -> None:
    """Receives the gradients of uses that are left out."""


class Interceptor(TorchFunctionMode):
    """The function mode of one forward pass, and of the backward passes through what it computed.

    Args:
        tapping: what it has in common with other passes.
        batch_size: examples of the batch, None if not known.
        inputs: the batch's tensors.
        doubt: whether tensors made without data that have the batch's size are taken for states of the examples; else
            they are constants.
        trains: parameters take part in autograd as well, so that a backward pass of the user's own gives them
            gradients, too.

    Attributes:
        backward_call: what a backward pass that the user calls is given to, see :class:`stepinfluence.capture.inline`.
        look: called before each call, see :class:`stepinfluence.capture.body.state.Watcher`.
        owners: whose the operands' rows are.
        usage: which targets this forward pass used, and how.
        uses: all uses of this forward pass.
        shared: what these uses have in common.
    """

    def __init__(
        self,
        tapping: Tapping,
        batch_size: int | None,
        inputs: Sequence[Tensor],
        *,
        doubt: bool,
        trains: bool = False,
    ) -> None:
        super().__init__()
        self._tapping = tapping
        self._doubt, self._trains, self._in_own_pass = doubt, trains, False
        self.backward_call: Callable[[Callable[..., Any], Any, Any], Any] | None = None
        self.look: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None
        self._provenance = Provenance(tapping.tensors)
        self._without_rows = False
        self._sink: GradientSink | None = None
        memory = tapping.memories.of(batch_size, doubt)
        self.owners = Ownership(self._provenance, batch_size, tapping.batch_dim, inputs, memory)
        self._recall = Recall(self._provenance, self.owners.follower)
        self.usage, self.hooked = Usage(), False
        self.uses: list[Use] = []
        self.shared = Pass()

    def backward(self, losses: Tensor, weights: Tensor, sink: GradientSink, *, keep: bool) -> None:
        """A backward pass from the losses ``(B,)`` to the taps alone, which hands the gradients at all uses to a sink.

        Args:
            weights: of the losses, ``(B,)``.
            keep: keep the graph for another.
        """
        # The anchor is reached through taps only: nothing but the way from the loss to the taps is computed. The mode
        # is on because activation checkpointing runs the forward pass again.
        with self.receiving(losses, sink), self:
            torch.autograd.backward(losses, weights, inputs=[self._tapping.anchor], retain_graph=keep)

    @contextmanager
    def receiving(self, losses: Tensor, sink: GradientSink) -> Iterator[None]:
        """Around a backward pass: the gradients of ``losses`` at all uses go to a sink."""
        shared = self.shared

        def began(_: Tensor) -> None:
            shared.graph_task = torch._C._current_graph_task_id()

        handle = losses.register_hook(began)
        self._sink, self._in_own_pass = sink, True
        try:
            yield
            sink.finish()
        finally:
            handle.remove()
            shared.arranged = None  # a saved tensor, it may be, whose graph leads back here by the taps
            shared.graph_task = -1
            self._sink, self._in_own_pass = None, False

    @property
    def sink(self) -> GradientSink:
        """What gradients are handed to in the backward pass that is running."""
        assert self._sink is not None
        return self._sink

    # ------------------------------------------------------------------------------------------------------------
    # What rules need

    def detached(self, value: Any) -> Any:
        """A parameter as autograd does not see it, unless it is to train; anything else as it is."""
        return value if self._trains or self.source(value) is None else value.detach()

    def without_capture(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The call with its sources detached."""
        args, kwargs = pytree.tree_map(self.detached, (args, kwargs))
        return func(*args, **kwargs)

    def source(self, value: object) -> Source | None:
        return self._provenance.source_of(id(value))

    def is_constant(self, value: object) -> bool:
        return self._provenance.is_constant(value)

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
        step = self._tapping.steps.current
        targets = [target for source in used if source is not None for target in source.targets]
        if step is None and any(source is not None and source.in_loop for source in used):
            raise constants_only(targets[0].name)
        if step is None and self._tapping.outside == "error":
            raise used_outside(targets[0].name, resolve_name(operation) or operation.__name__)
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
        self.shared.dtypes.add(output.dtype)
        return tap_output(output, self._tapping.anchor, self._received(use, receive), *saved)

    def tap_expanded(self, source: Source, use: Use, receive: Receive, shape: tuple[int, ...]) -> Tensor:
        """``source`` expanded to ``shape``, with the gradient of that shape handed to ``receive``."""
        self.shared.dtypes.add(source.tensor.dtype)
        return tap_expanded(self.detached(source.tensor), self._tapping.anchor, self._received(use, receive), shape)

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

    def is_one_for_all(self, value: Tensor, index: list[Tensor]) -> bool:
        """Whether no examples are among what was made without data, and is written to at ``index``, by their shapes."""
        constant, shaped = self.is_constant(value), [i for i in index if self._is_batch_shaped(i)]
        self.owners.doubted |= constant and bool(shaped) and all(map(self.owners.guessed.has_id, map(id, shaped)))
        return constant and not shaped

    def unsupported(self, sources: list[Source], func: Callable[..., Any], why: str) -> UnsupportedUseError:
        names = ", ".join(dict.fromkeys(s.name for s in sources))
        return UnsupportedUseError(
            f"{names}: its use in {resolve_name(func) or getattr(func, '__name__', func)} cannot be captured ({why}); "
            "rewrite it with a linear, matmul, embedding, normalisation or elementwise operation, or set "
            "requires_grad=False on the parameter to leave it out"
        )

    # ------------------------------------------------------------------------------------------------------------
    # Dispatch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            return func(*args, **kwargs)
        if self.look is not None:
            self.look(func, args, kwargs)
        key = self._recall.key(func, args, kwargs)
        if key is not None and not key[0] and (outcome := self._recall.outcome(key)) is not None:
            result = func(*args, **kwargs)
            if not self._recall.apply(outcome, result):
                self._note(func, args, kwargs, result, self._operands(func, args, kwargs))
            return result
        found = self._operands(func, args, kwargs)
        if found.named:
            return self.__torch_function__(func, types, plain(args), plain(kwargs))
        self.usage.looked |= func in LOOKS and bool(found.data)
        self.hooked |= func is Tensor.register_hook
        if func in GRADIENT_TAKERS:
            if in_backward() or self._in_own_pass:
                # The capture's own backward pass, or one within it (a hook's), with this mode on: a recomputation must
                # tap as the forward did.
                return self.look_inside(func, args, kwargs)
            if self.backward_call is not None and func is not torch.autograd.grad:
                return self.backward_call(func, args, kwargs)
            self._refuse_inner_gradients(func, args)
        if not found.sources or not torch.is_grad_enabled():
            if found.sources and not in_backward() and in_custom_function():
                raise self.unsupported(
                    found.sources,
                    func,
                    "inside a custom autograd function; checkpointing must have use_reentrant=False, and a solver of "
                    "differential equations must be differentiated through, without the adjoint method",
                )
            result = self._without_sources(func, args, kwargs, found)
            if key is not None and not found.sources:
                self._recall.learn(key, args, result)
            return result
        if not found.data:
            return self.batch_free(func, args, kwargs, found.sources)
        if not in_backward():
            if torch._C._functorch.maybe_current_level() is not None:
                raise in_transform(found.sources)
            self.owners.give(found.data)
        outer, self._without_rows = self._without_rows, all(t.numel() == 0 for t in found.data)
        try:
            result = self._tapped(func, args, kwargs, found.sources)
        finally:
            self._without_rows = outer
        if self.owners.following:
            known = None if key is None else self._recall.outcome(key)
            if known is None or not self._recall.apply(known, result):
                self._follow_use(func, args, kwargs, result, found)
                if key is not None and func in self._tapping.rules:
                    self._recall.learn(key, args, result)
        return result

    def _operands(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands:
        given = (args[:1], {}) if func in OF_FIRST else (args, kwargs)
        return Operands(self._provenance, *given)

    def _without_sources(self, func: Any, args: Any, kwargs: Any, found: Operands) -> Any:
        if self.owners.following and found.data:
            for operand in found.data:
                self.owners.follower.meets(operand)
            if not self.owners.follower.has_rule(func) and getattr(func, "__module__", None) in LOOKED_INTO:
                result = self.look_inside(func, args, kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_nested and not in_backward():
            raise nested(f"the result of {resolve_name(func) or func.__name__}")
        if found.sources:
            self.usage.saw(func, found.sources, result)
        self._note(func, args, kwargs, result, found)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, found: Operands) -> None:
        """What is known of the results of a call in which no source takes part in autograd."""
        if not found.data:
            self._note_constants(func, args, result, bool(found.sources) or found.has_constant)
            return
        self._note_data(func, args, kwargs, result, found)
        if self.owners.following:
            in_place = changes_in_place(func, kwargs)
            self.owners.follower.follow(func, args, kwargs, result, found.data, in_place=in_place)

    def _tapped(self, func: Any, args: Any, kwargs: Any, sources: list[Source]) -> Any:
        """The result of a call in which sources meet data."""
        rule = self._tapping.rules.get(func)
        if any(is_sharded(source.tensor) for source in sources):
            raise self.unsupported(sources, func, "as a DTensor, outside of a linear layer")
        if any(source.tensor.layout != torch.strided for source in sources):
            raise self.unsupported(sources, func, "as a sparse tensor; call to_dense() on it")
        result = NotImplemented if rule is None else rule(self, func, args, kwargs)
        if result is NotImplemented:
            result = self.look_inside(func, args, kwargs)
        return self._tapping.otherwise(self, func, args, kwargs) if result is NotImplemented else result

    def _follow_use(self, func: Any, args: Any, kwargs: Any, result: Any, found: Operands) -> None:
        results = result if isinstance(result, tuple | list) else (result,)
        if any(self.source(r) is not None for r in results):
            return  # the data only picked a part of the parameter
        follower, in_place = self.owners.follower, changes_in_place(func, kwargs)
        if all(follower.knows(r) for r in results if isinstance(r, Tensor)) and not in_place:
            return  # its parts have been followed
        follower.follow(func, args, kwargs, result, found.data, in_place=in_place, use=True)

    def _refuse_inner_gradients(self, func: Any, args: Any) -> None:
        outputs = args[0] if args and isinstance(args[0], tuple | list) else args[:1]
        if has_tap(outputs):
            raise inner_gradients(func.__qualname__)

    def _is_batch_shaped(self, value: Tensor) -> bool:
        size, dims = self.owners.batch_size, self.owners.example_dims
        if not self._doubt or value.dim() == 0:
            return False
        return size is None or any(value.dim() > k and value.shape[k] == size for k in dims)

    def _note_data(self, func: Any, args: Any, kwargs: Any, result: Any, found: Operands) -> None:
        """Tell data from constants in what an operation without target parameters gives."""
        known = self._provenance
        if found.has_constant and changes_in_place(func, kwargs):
            known.constants.discard_sharing(kwargs["out"] if kwargs.get("out") is not None else args[0])
        if found.only_doubtful:
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor):
                    (known.doubtful if self._is_batch_shaped(value) else known.constants).add(value)

    def _note_constants(self, func: Any, args: Any, result: Any, from_constants: bool) -> None:
        known, size, dims = self._provenance, self.owners.batch_size, self.owners.example_dims
        for value in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(value, Tensor) or (func in CONSTRUCTORS and self._doubt and self.owners.made_here(value)):
                continue
            if from_constants:
                # A table of positions, one row for all examples, becomes data where it gets a row for each.
                data = (
                    self._doubt
                    and func in EXPANSIONS
                    and bool(args)
                    and gains_examples(args[0].shape, value.shape, size, dims) is not None
                )
            else:
                data = func not in STRUCTURE_FACTORIES and self._is_batch_shaped(value)
            (known.doubtful if data else known.constants).add(value)

    def batch_free(self, func: Any, args: Any, kwargs: Any, sources: list[Source]) -> Any:
        """A call in which no data takes part: what it gives is a source, too."""
        if self.owners.batch_size is not None and self._doubt and len(sources) == 1:
            expanded = self._tapping.expand(self, func, args, kwargs)
            if expanded is not NotImplemented:
                return expanded
        # These graphs are walked once per example: they are kept out of activation checkpointing. What is saved must
        # not hold the graph that it is saved in (a result, such as exp's), or no collector would find the circle.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t):
            result = func(*args, **kwargs)
        self.usage.saw(func, sources, result)
        if changes_in_place(func, kwargs):
            self._provenance.changed_in_place(kwargs["out"] if kwargs.get("out") is not None else args[0], sources)
            return result
        inside = self._tapping.steps.current is not None and any(map(self.is_constant, tensors_in((args, kwargs))))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and self.source(value) is None:
                self._provenance.add_derived(value, sources, in_loop=inside)
        return result
