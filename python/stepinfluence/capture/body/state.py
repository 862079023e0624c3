"""The model as it is between batches: whatever a forward or backward pass changes in it is put back.

A batch's features must not depend on the batches before it, nor the model on having been featurized. Put back are,
after every pass: buffers (also those that a pass adds or replaces), plain attributes of modules (counters, caches,
states carried over), and weights that the pass itself rewrites (``nn.Embedding(max_norm=...)``).
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from stepinfluence.capture.body.hooks import Hooks
from stepinfluence.errors import BodyError
from stepinfluence.wrappers import canonical_name

_INTERNAL = frozenset(("_parameters", "_buffers", "_modules", "_compiled_call_impl"))
_CONTAINERS = (list, dict, set, deque, OrderedDict)
_DATA = (Tensor.data.__get__, Tensor.data.__set__, Tensor.detach, Tensor.detach_)  # type: ignore[attr-defined]
_LOOKUPS = (F.embedding, F.embedding_bag)

_running: weakref.WeakKeyDictionary[nn.Module, ModelState] = weakref.WeakKeyDictionary()
"""The state of every model that is being featurized."""


def running(model: nn.Module) -> ModelState | None:
    """The state of a model that is being featurized (within :func:`keeping`); None if it is not."""
    return _running.get(model)


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model with parameters that its first pass makes.

    Raises:
        BodyError: as said (names the first of them).
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise BodyError(
                f"{canonical_name(name)}: has no shape yet (a lazy module); run one batch through the model first"
            )


@contextmanager
def keeping(model: nn.Module, gathered: Iterable[nn.Parameter] = ()) -> Iterator[ModelState]:
    """Keep the state of ``model`` within this context, and silence the hooks on its parameters.

    Args:
        gathered: what modules compute with in place of parameters that are sharded.
    """
    outer = _running.get(model)
    if outer is not None:  # a run within a run of the same model
        with outer.batch():
            yield outer
        return
    state = _running[model] = ModelState(model, gathered)
    try:
        with state.hooks.silenced():
            yield state
    finally:
        del _running[model]
        state.wake()


class _Tensor:
    """A tensor, and what it held."""

    def __init__(self, value: Tensor, before: _Tensor | None) -> None:
        self.value = value
        self.version = value._version
        same = before is not None and before.value is value and before.version == value._version
        self.held: Tensor = before.held if same and before is not None else value.detach().clone()

    def put_back(self) -> None:
        value, held = self.value, self.held
        if value.shape != held.shape:
            value.data = held.clone()
        elif value.layout != torch.strided or not torch.equal(value.detach(), held):
            value.data.copy_(held)
        self.version = value._version


def _is_state(tensor: Tensor) -> bool:
    """Whether a tensor may be written to in a pass: not weights, and not what is computed from them."""
    return tensor.grad_fn is None and not tensor.is_inference() and not isinstance(tensor, nn.Parameter)


def _fill(value: Any, held: Any) -> None:
    """A container with the items that it had."""
    if len(value) == len(held):
        if isinstance(value, dict):
            same = all(a is b and value[a] is held[b] for a, b in zip(value, held, strict=True))
        else:
            same = value == held if isinstance(value, set) else all(a is b for a, b in zip(value, held, strict=True))
        if same:
            return
    value.clear()
    (value.extend if isinstance(value, list | deque) else value.update)(held)


class _ModuleState:
    """Buffers and attributes of one module; of the module itself, not of those within.

    Taken for every module and batch: most of it is a copy of two dictionaries.
    """

    __slots__ = ("attributes", "buffers", "containers", "module", "tensors")

    def __init__(self, module: nn.Module, before: _ModuleState | None) -> None:
        self.module = module
        self.buffers, self.attributes = dict(module._buffers), vars(module).copy()
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: dict[int, _Tensor] = {}
        known: dict[int, _Tensor] = before.tensors if before is not None else {}
        for name, value in self.attributes.items():
            if type(value) in _CONTAINERS and name not in _INTERNAL:
                self.containers.append((value, value.copy() if value else ()))
        inside = (v for c, _ in self.containers for v in (c.values() if isinstance(c, dict) else c))
        for value in (*self.buffers.values(), *self.attributes.values(), *inside):
            if isinstance(value, Tensor) and _is_state(value):
                self.tensors[id(value)] = _Tensor(value, known.get(id(value)))

    def put_back(self) -> None:
        for tensor in self.tensors.values():
            tensor.put_back()
        if isinstance(self.module, torch.jit.ScriptModule):  # its buffers are not kept in Python
            return
        for value, held in self.containers:
            if value or held:
                _fill(value, held)
        for held, now in ((self.buffers, self.module._buffers), (self.attributes, vars(self.module))):
            for name in [n for n in now if n not in held]:
                del now[name]
            for name, value in held.items():
                if name not in _INTERNAL and now.get(name, _fill) is not value:
                    now[name] = value


def _place(parameter: nn.Parameter) -> tuple[int, int]:
    """What changes when a parameter is written to, or given other memory."""
    try:
        return parameter._version, parameter.data_ptr()
    except RuntimeError:  # a tensor subclass without memory of its own
        return parameter._version, 0


class ModelState:
    """What :func:`keeping` keeps of a model.

    Attributes:
        hooks: on the model's parameters, silenced during the run.
    """

    def __init__(self, model: nn.Module, gathered: Iterable[nn.Parameter] = ()) -> None:
        self._model = model
        self._gathered = [(whole, whole._version) for whole in gathered]
        self._parameters = {id(p): (canonical_name(name), p) for name, p in model.named_parameters()}
        refuse_lazy(model)
        self.hooks = Hooks(list(self._parameters.values()))
        self._modules: dict[nn.Module, _ModuleState] = {}
        self._last: dict[nn.Module, _ModuleState] = {}
        self._dirty = False
        self._trained: set[int] = set()
        self._saved: dict[int, Tensor] = {}
        self._passes = 0
        self._asleep: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        self._replace_inference_tensors()
        self._note_weights()

    def _replace_inference_tensors(self) -> None:
        """Buffers and cached tensors made under ``torch.inference_mode`` cannot take part in a backward pass: copies
        stand in for them during the run."""
        for module in self._model.modules():
            for place in (module._buffers, vars(module)):
                for name, value in list(place.items()):
                    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_inference():
                        copy = value.clone()
                        self._asleep.append((place, name, value, copy))
                        place[name] = copy

    def wake(self) -> None:
        """Give the model back the tensors that copies stood in for."""
        for place, name, original, copy in self._asleep:
            if place.get(name) is copy:
                place[name] = original

    def _note_weights(self) -> None:
        self._versions = {key: _place(p) for key, (_, p) in self._parameters.items() if not p.is_inference()}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around all passes of one batch: what the model is at the beginning, it is at the end."""
        outer = self._modules
        # Lazy modules take off hooks and become other classes in their first pass, for good.
        modules = list(self._model.modules())
        lazy = {m for m in modules if isinstance(m, LazyModuleMixin) and m.has_uninitialized_params()}
        self._modules = {m: _ModuleState(m, self._last.get(m)) for m in modules if m not in lazy}
        self._note_weights()
        self._trained = {key for key, (_, p) in self._parameters.items() if p.requires_grad}
        try:
            yield
        finally:
            self.put_back()
            self._last, self._modules = self._modules, outer

    def put_back(self) -> None:
        """Undo what passes have changed since the batch began."""
        if not self._dirty:
            return
        self._dirty = False
        with torch.no_grad():
            for state in self._modules.values():
                state.put_back()
            for key, value in self._saved.items():
                parameter = self._parameters[key][1]
                if parameter.data_ptr() != value.data_ptr() and parameter.shape != value.shape:
                    parameter.data = value.clone()
                elif not torch.equal(parameter.detach(), value):
                    parameter.data.copy_(value)
        for key, (_, parameter) in self._parameters.items():
            if parameter.requires_grad != (key in self._trained):
                parameter.requires_grad_(key in self._trained)
        self.hooks.forget_new()
        self._note_weights()

    def watched(self, watcher: Watcher | None = None) -> AbstractContextManager[object]:
        """Around the model's forward pass, within any other function mode.

        In the first pass of a run, weights that it is about to rewrite are copied first. Afterwards a weight that was
        rewritten without a copy is an error.

        Args:
            watcher: a function mode that is on, and can look at calls on the way.

        Raises:
            BodyError: as said (names the parameter).
            UnsupportedUseError: a hook was put on a parameter within the pass.
        """
        self._passes += 1
        self._dirty = True
        if self._passes > 1:
            return self._checked(nullcontext())
        guard = _Guard(self._parameters, self._saved)
        return self._checked(guard if watcher is None else _lent(watcher, guard.look))

    @contextmanager
    def _checked(self, guard: AbstractContextManager[object]) -> Iterator[None]:
        with guard:
            yield
        self.hooks.refuse_new()
        if any(whole._version != version for whole, version in self._gathered):
            raise BodyError(
                "model: its forward pass changes weights that are sharded over processes, in the gathered copy, which "
                "is thrown away; change them outside of forward()"
            )
        for key, known in self._versions.items():
            name, parameter = self._parameters[key]
            if key not in self._saved and _place(parameter) != known:
                raise BodyError(
                    f"{name}: the forward pass changes this weight, so that features would be of several models; "
                    "change it outside of forward(), or load the weights again and featurize it without that change"
                )


class Watcher(Protocol):
    """A function mode that calls ``look``, where there is one, before each call that it sees."""

    look: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None


@contextmanager
def _lent(watcher: Watcher, look: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    watcher.look = look
    try:
        yield
    finally:
        watcher.look = None


@functools.cache
def _writing(func: Any) -> Literal["lookup", "name", "operator"] | None:
    """In what way a torch function may write to a tensor, as far as the function tells."""
    if func in _LOOKUPS:
        return "lookup"
    name = getattr(func, "__name__", "")
    if func in _DATA or name.rstrip("_") + "_" == name:
        return "name"
    return "operator" if name.startswith(("__i", "__set")) else None


class _Guard(TorchFunctionMode):
    """Copies a parameter just before a call that may write to it."""

    def __init__(self, parameters: dict[int, tuple[str, nn.Parameter]], saved: dict[int, Tensor]) -> None:
        super().__init__()
        self._parameters, self._saved = parameters, saved

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.look(func, args, kwargs)
        return func(*args, **kwargs)

    def look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call."""
        written, kind = None, _writing(func)
        if kind == "lookup":
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            renormed = kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None
            written = given.get("weight") if renormed else None
            if func is F.embedding_bag and isinstance(written, Tensor) and not written.is_floating_point():
                written = given.get("input")  # the older order of arguments
        elif kind == "name":
            written = args[0] if args else None
        elif "out" in kwargs or kind == "operator":
            written = kwargs.get("out", args[0] if args else None)
        if isinstance(written, Tensor):
            self._keep(written)

    def _keep(self, tensor: Tensor) -> None:
        base = tensor if tensor._base is None else tensor._base
        if id(base) in self._parameters and id(base) not in self._saved:
            self._saved[id(base)] = base.detach().clone()
