"""The parameters of the loop body: found, named, and given a sketch each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from sdi_kernels import CountSketch, HashFamily, TensorSketch
from stepinfluence.arguments import boolean, non_negative_int
from stepinfluence.capture.body.state import refuse_lazy
from stepinfluence.errors import BodyError
from stepinfluence.shards import is_sharded, refuse_other_ways
from stepinfluence.wrappers import canonical_name as canonical_name
from stepinfluence.wrappers import unwrap as unwrap

Body: TypeAlias = nn.Module | str | Sequence[nn.Module | str]
Layout: TypeAlias = Literal["concat", "sum"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of parameters that can be captured."""


@dataclass(frozen=True, eq=False)
class Target:
    """One body parameter. Scalars and vectors are CountSketched, all else is TensorSketched as a matrix, see
    :func:`as_matrix`.

    Attributes:
        parameter: what the model computes with.
        held: what the model holds between passes: the same, or this process's part of it.
    """

    name: str
    parameter: nn.Parameter
    sketch: CountSketch | TensorSketch
    held: nn.Parameter

    @functools.cached_property
    def matrix_shape(self) -> tuple[int, int]:
        return as_matrix(self.parameter.shape)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the matrix that a parameter is sketched as: its leading dimensions against its last ones.

    A stack of matrices ``(E, o, i)``, as of experts, has E o rows, so that each of them is a piece of the matrix. What
    tells it from a convolution's weight ``(O, C, k)``, which has O rows, is that it takes less than half of the numbers
    to hash: where no other split does, the first dimension is the rows.
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    splits = [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]
    best = min(splits, key=sum)
    return best if 2 * sum(best) < sum(splits[0]) else splits[0]


def check_model(model: object, *, outside: object, batch_dim: object, training: object, verify: object = True) -> None:
    """What captures of any kind are given, but for the body.

    Raises:
        TypeError, ValueError: one of them is not what it should be (names it).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; pass a torch.nn.Module")
    if outside not in ("error", "ignore"):
        raise ValueError(f"outside: got {outside!r}; use 'error' or 'ignore'")
    non_negative_int("batch_dim", batch_dim)
    boolean("training", training)
    boolean("verify", verify)


def _module_list(model: nn.Module, body: Body) -> list[nn.Module]:
    if not isinstance(body, nn.Module | str | Iterable):
        raise BodyError(f"body: got {type(body).__name__}; pass a module of the model, its name, or a list of them")
    items: Sequence[nn.Module | str] = [body] if isinstance(body, nn.Module | str) else list(body)
    modules: list[nn.Module] = []
    for item in items:
        if isinstance(item, str):
            try:
                item = model.get_submodule(item)
            except AttributeError:
                children = ", ".join(name for name, _ in model.named_children())
                raise BodyError(
                    f"body: the model has no submodule {item!r}; its children are: {children or 'none'}"
                ) from None
        if not isinstance(item, nn.Module):
            raise BodyError(f"body: got {type(item).__name__}; pass a module of the model, its name, or a list of them")
        # Containers have no forward of their own: their children are what the loop enters.
        modules.extend(item if isinstance(item, nn.ModuleList) else [unwrap(item)])
    if not modules:
        raise BodyError("body: got an empty list; pass the module (or modules) that the loop applies at every step")
    return list(dict.fromkeys(modules))


def find_body(model: nn.Module, body: Body) -> list[nn.Module]:
    """The modules of the loop body, checked to be part of ``model``.

    Raises:
        BodyError: ``body`` names no module, is empty, or is not part of the model.
    """
    modules = _module_list(model, body)
    inside = set(model.modules())
    for module in modules:
        scripted = next((m for m in module.modules() if isinstance(m, torch.jit.ScriptModule)), None)
        if scripted is not None:
            raise BodyError(
                f"body: {type(module).__name__} holds a scripted module, whose operations cannot be seen; "
                "use the module it was scripted from"
            )
        if module not in inside:
            raise BodyError(
                f"body: {type(module).__name__} is not a submodule of the model; pass a module of this model"
            )
    return modules


def body_parameters(
    model: nn.Module, body: Sequence[nn.Module], used: Callable[[nn.Parameter], nn.Parameter | None] | None = None
) -> dict[str, nn.Parameter]:
    """Trainable parameters of the body by canonical name, in the model's order.

    Args:
        used: what modules compute with for a parameter that is sharded over processes; None where that is not known.

    Raises:
        BodyError: there is none, or one is sharded over processes in a way that is not known, or cannot be captured as
            it is (complex, without values, sparse, empty).
    """
    refuse_other_ways(model)
    refuse_lazy(model)
    wanted = {id(p) for module in body for p in module.parameters() if p.requires_grad}
    found = {canonical_name(name): p for name, p in model.named_parameters() if id(p) in wanted}
    if not found:
        raise BodyError(
            "body: it has no trainable parameter; pass the module whose weights the loop shares "
            "and set requires_grad=True on them"
        )
    for name, parameter in found.items():
        if is_sharded(parameter) and (used is None or used(parameter) is None):
            placements: Any = getattr(parameter, "placements")  # noqa: B009  # of a DTensor
            raise BodyError(
                f"{name}: is sharded over processes as a DTensor ({', '.join(map(str, placements))}), which "
                "cannot be captured; use fully_shard on plain parameters, or ColwiseParallel and RowwiseParallel for "
                "linear layers, or give every process the whole model (docs/scale.md)"
            )
        if (reason := _unusable(parameter)) is not None:
            raise BodyError(f"{name}: {reason}")
    return found


def _unusable(parameter: nn.Parameter) -> str | None:
    """Why a parameter cannot be captured, and what to do about it; None where it can."""
    if parameter.is_meta:
        return "is on the meta device, where it has no values; load the weights, then attach"
    if parameter.is_complex():
        return (
            "is complex; keep it as a real parameter with a last dimension of 2 and use it through "
            "torch.view_as_complex, or set requires_grad=False on it"
        )
    if parameter.dtype not in DTYPES:
        return f"is of {parameter.dtype}; use {', '.join(map(str, DTYPES))}, or set requires_grad=False on it"
    if parameter.layout != torch.strided:
        return "is a sparse tensor; keep it dense, or set requires_grad=False on it"
    if parameter.numel() == 0:
        return f"has no entries (shape {tuple(parameter.shape)}); set requires_grad=False on it"
    return None


def _size_of(
    name: str, parameter: nn.Parameter, sketch_size: int | Mapping[str, int], hashing: HashFamily, layout: Layout
) -> int:
    """m of one parameter."""
    if isinstance(sketch_size, Mapping):
        if name not in sketch_size:
            raise ValueError(f"sketch_size: the mapping has no entry for body parameter {name!r}; add one")
        return sketch_size[name]
    short_vector = parameter.dim() <= 1 and parameter.numel() > 0
    if hashing != "iid" and layout == "concat" and short_vector and isinstance(sketch_size, int):
        # Balanced hashing (and that in blocks) of a vector into no fewer buckets than it has entries is a signed
        # permutation, and so into exactly as many: the columns beyond would hold zeros.
        return min(sketch_size, parameter.numel())
    return sketch_size


def make_targets(
    parameters: Mapping[str, nn.Parameter],
    used: Callable[[nn.Parameter], nn.Parameter | None] = lambda parameter: parameter,
    *,
    sketch_size: int | Mapping[str, int],
    hashing: HashFamily,
    seed: int,
    layout: Layout = "concat",
) -> list[Target]:
    """A target with its own independent sketch for each parameter (paper, section 3: one CS/TS map per tensor).

    Args:
        parameters: as :func:`body_parameters` gives them.
        used: as there.

    Raises:
        ValueError, TypeError: ``sketch_size`` is not positive, misses a parameter, or is a mapping in the ``sum``
            layout; ``hashing`` or ``layout`` is unknown.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout: got {layout!r}; use 'concat' or 'sum'")
    if layout == "sum" and isinstance(sketch_size, Mapping):
        raise ValueError("sketch_size: got a mapping, but with layout='sum' all parameters share one M; give a number")
    targets = []
    for name, parameter in parameters.items():
        m = _size_of(name, parameter, sketch_size, hashing, layout)
        sketch: CountSketch | TensorSketch
        if parameter.dim() <= 1:
            sketch = CountSketch(parameter.numel(), m, seed=seed, name=name, hashing=hashing)
        else:
            sketch = TensorSketch(*as_matrix(parameter.shape), m, seed=seed, name=name, hashing=hashing)
        whole = used(parameter)
        targets.append(Target(name, parameter if whole is None else whole, sketch, parameter))
    return targets


def single_device(parameters: Mapping[str, nn.Parameter]) -> torch.device:
    """The device all body parameters lie on.

    Raises:
        BodyError: they lie on several.
    """
    devices = {p.device for p in parameters.values()}
    if len(devices) > 1:
        raise BodyError(f"body: its parameters lie on {sorted(map(str, devices))}; move the body to one device")
    return devices.pop()
