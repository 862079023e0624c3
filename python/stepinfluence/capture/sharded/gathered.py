"""Models whose parameters FSDP2 (``fully_shard``) has spread over processes.

A module computes with one tensor for each of its parameters, which is made when they are first gathered, filled before
every use and emptied after it. By that tensor a capture knows the parameter; what ``named_parameters`` gives between
passes is this process's part. Gradients are caught where parameters are used, so that none is ever reduced.

What FSDP2 does around a module is not the model's own: its hooks run unseen by the interceptor, which is told what they
gave in place of what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from stepinfluence.capture.sharded.company import Company
from stepinfluence.capture.uses.interceptor import Interceptor
from stepinfluence.errors import BodyError


class Gathered:
    """What FSDP2 has sharded of a model.

    Args:
        model: unwrapped. If it is sharded, all processes must make this: parameters are gathered once, module by
            module.

    Attributes:
        company: is told what is gathered.
        groups: the process groups that gather together.
        wholes: the tensors that modules compute with, by the identity of the sharded parameters.

    Raises:
        BodyError: this torch keeps sharded modules in another way than is known.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[Any] = [m for m in model.modules() if hasattr(m, "_get_fsdp_state")]
        self.company, self.wholes, self.groups = Company(), dict[int, nn.Parameter](), list[Any]()
        if not self._modules:
            return
        try:
            self._states = list(dict.fromkeys(m._get_fsdp_state() for m in self._modules))
            self._groups = [group for state in self._states for group in _groups_of(state)]
            self._gather_once()
            meshes = [group.mesh_info for group in self._groups]
            self.groups = [mesh.shard_process_group for mesh in meshes]
            # Under HSDP all that hold a copy go along, so that they find the same shards of a store.
            copies = (getattr(mesh, "replicate_process_group", None) for mesh in meshes)
            self.groups += [group for group in copies if group is not None]
        except AttributeError as error:
            raise BodyError(
                f"model: is sharded by a fully_shard that is not known (torch {torch.__version__}: {error}); use the "
                "torch that the pins name, or do not shard it"
            ) from error

    def _gather_once(self) -> None:
        for module in self._modules:
            groups = _groups_of(module._get_fsdp_state())
            if any(not hasattr(p, "_unsharded_param") for group in groups for p in group.fsdp_params):
                module.unshard()
            module.reshard()
        for group in self._groups:
            for parameter in group.fsdp_params:
                self.wholes[id(parameter.sharded_param)] = parameter._unsharded_param

    @property
    def device(self) -> torch.device | None:
        """Where parameters are gathered; None if there are none."""
        return self._groups[0].device if self._modules and self._groups else None

    @property
    def any(self) -> bool:
        """Whether anything is sharded."""
        return bool(self._modules)

    def whole(self, parameter: nn.Parameter) -> nn.Parameter:
        """The tensor that modules compute with, for a parameter as ``named_parameters`` has it."""
        return self.wholes.get(id(parameter), parameter)

    def reshard(self) -> None:
        """Give up what is gathered: ``named_parameters`` has the sharded ones afterwards."""
        for module in self._modules:
            module.reshard()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the passes of a run: FSDP2's hooks run unseen, and reduce no gradients."""
        if not self._modules:
            yield
            return
        self._check()
        with ExitStack() as stack:
            self.reshard()
            stack.callback(self.reshard)
            for module in self._modules:
                stack.enter_context(_unseen_hooks(module))
            for state in self._states:
                stack.enter_context(_replaced(state, "_pre_backward", self._noting(state)))
                stack.enter_context(_unseen(state, "_root_post_backward_final_callback"))
            for group in self._groups:
                stack.enter_context(_unseen(group, "post_backward"))
                stack.enter_context(_unseen(group, "pre_forward", before=self._entering(group)))
                stack.enter_context(_replaced(group, "reduce_grads", False))
            try:
                yield
            except BaseException:
                for module in self._modules:
                    if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):
                        module.reset_iter_state()
                raise

    def _check(self) -> None:
        """Raises BodyError where modules compute with other tensors than when this was made."""
        for group in self._groups:
            for parameter in group.fsdp_params:
                if self.wholes.get(id(parameter.sharded_param)) is not parameter._unsharded_param:
                    raise BodyError(
                        f"model: its sharded parameters were made anew after the capture was made (such as "
                        f"{parameter._module_info.param_name}); attach again"
                    )

    def _noting(self, state: Any) -> Callable[[Tensor], Tensor]:
        number, before = self._states.index(state), state._pre_backward

        def pre_backward(grad: Tensor) -> Tensor:
            self.company.did(f"backward {number}")
            with torch._C.DisableTorchFunction():
                return before(grad)  # type: ignore[no-any-return]

        return pre_backward

    def _entering(self, group: Any) -> Callable[[], None]:
        number = self._groups.index(group)
        return lambda: self.company.did(f"forward {number}")


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object with another value within this context."""
    had, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _unseen(owner: Any, name: str, before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A method of an object that is not seen by function modes within this context."""
    method = getattr(owner, name)

    def unseen(*args: Any, **kwargs: Any) -> Any:
        before()
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    with _replaced(owner, name, unseen):
        yield


def _groups_of(state: Any) -> list[Any]:
    """The groups of parameters that a module gathers; older versions of torch have at most one."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _of_fsdp(hook: Any) -> bool:
    """Whether a module's hook is one of FSDP2's, perhaps wrapped."""
    while hook is not None:
        if any(kind.__name__ == "FSDPState" for kind in type(getattr(hook, "__self__", None)).__mro__):
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False


@contextmanager
def _unseen_hooks(module: nn.Module) -> Iterator[None]:
    """FSDP2's hooks on a module, unseen by function modes; an interceptor is told what they gave in place of what."""
    places = [
        (hooks, key, hook)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if _of_fsdp(hook)
    ]
    for hooks, key, hook in places:
        hooks[key] = _standing_in(hook, before=hooks is module._forward_pre_hooks)
    try:
        yield
    finally:
        for hooks, key, hook in places:
            hooks[key] = hook


def _standing_in(hook: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
    def unseen(module: nn.Module, args: Any, more: Any) -> Any:
        """``more``: keyword arguments before the module runs, what it gave after it."""
        with torch._C.DisableTorchFunction():
            result = hook(module, args, more)
            # A view of what a custom function gave: its hooks pass gradients on as they are.
            result = pytree.tree_map_only(Tensor, lambda t: t.view_as(t) if before and t.requires_grad else t, result)
        given = (args, more) if before else more
        for mode in _get_current_function_mode_stack():
            if isinstance(mode, Interceptor):
                with torch._C.DisableTorchFunction():
                    mode.owners.stand_in(given, result)
        return result

    return unseen
