"""An optimizer's metric: influence ``<P * grad(z), phi_t(z')>`` with the elementwise ``P`` that training steps with.

Features hold ``sqrt(P) * gradient`` on both sides, so that scores stay inner products of features and self-influence
stays a square. A parameter's square root is given element by element, or as an outer product (docs/optimizers.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from stepinfluence.attribution.border import border
from stepinfluence.attribution.features import weights_digest
from stepinfluence.errors import CheckpointError
from stepinfluence.wrappers import canonical_name, unwrap

Kind: TypeAlias = Literal["adam", "adafactor", "sgd"]
KINDS: tuple[str, ...] = get_args(Kind)


def _part(values: Tensor, index: range) -> Tensor:
    return values[index.start : index.stop : index.step]


@dataclass(frozen=True, eq=False)
class Elementwise:
    """``sqrt(P)`` of one parameter, in the parameter's shape."""

    sqrt: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.sqrt,)

    def as_matrix(self) -> Tensor:
        """``(shape[0], prod(shape[1:]))``; vectors and scalars have one row."""
        return self.sqrt.reshape(len(self.sqrt), -1) if self.sqrt.dim() > 1 else self.sqrt.reshape(1, -1)

    def to(self, dtype: torch.dtype, device: torch.device) -> Elementwise:
        return Elementwise(self.sqrt.detach().to(device, dtype, copy=True).contiguous())

    def part(self, rows: range, columns: range, transposed: bool) -> Elementwise:
        """Of a strided piece of the parameter's matrix, oriented as the piece is."""
        some = _part(_part(self.as_matrix(), rows).T, columns)
        some = some if transposed else some.T
        return Elementwise(some if some.stride(1) == 1 else some.contiguous())  # kernels read dense rows

    def at_rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix by number: ``(*ids.shape, columns)``."""
        return self.as_matrix()[ids]


@dataclass(frozen=True, eq=False)
class Factored:
    """``sqrt(P) = rows (x) columns`` of one parameter, seen as a matrix ``(shape[0], prod(shape[1:]))``."""

    rows: Tensor
    columns: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows, self.columns

    def as_matrix(self) -> Tensor:
        """``(shape[0], prod(shape[1:]))``."""
        return self.rows[:, None] * self.columns

    def to(self, dtype: torch.dtype, device: torch.device) -> Factored:
        return Factored(*(t.detach().to(device, dtype, copy=True) for t in self.tensors))

    def part(self, rows: range, columns: range, transposed: bool) -> Factored:
        """Of a strided piece of the parameter's matrix, oriented as the piece is."""
        some = _part(self.rows, rows), _part(self.columns, columns)
        return Factored(*(some[::-1] if transposed else some))

    def at_rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix by number: ``(*ids.shape, columns)``."""
        return self.rows[ids].unsqueeze(-1) * self.columns


Root: TypeAlias = Elementwise | Factored
Preconditioner: TypeAlias = Mapping[str, Root]
"""By parameter name; parameters outside the loop body may be there too."""


def prepare(
    preconditioner: Preconditioner | None, parameters: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Root], str]:
    """The roots of the body's parameters where features are computed, and a digest of them (empty for None).

    Raises:
        TypeError, ValueError: not a mapping to roots, a body parameter has none, a shape does not fit, or values are
            not finite.
    """
    if preconditioner is None:
        return {}, ""
    if not isinstance(preconditioner, Mapping):
        raise TypeError(
            f"preconditioner: got {type(preconditioner).__name__}; pass a mapping from parameter name to root, as "
            "preconditioners.from_optimizer makes it"
        )
    given = {canonical_name(name): root for name, root in preconditioner.items()}
    roots: dict[str, Root] = {}
    for name, parameter in parameters.items():
        root = given.get(name)
        if root is None:
            raise ValueError(
                f"preconditioner: has no entry for body parameter {name!r} (did the optimizer train it?); add one, or "
                "set requires_grad=False on the parameter"
            )
        if not isinstance(root, Elementwise | Factored):
            raise TypeError(f"preconditioner: {name!r} is {type(root).__name__}; pass Elementwise or Factored")
        rows = parameter.shape[0] if parameter.dim() > 1 else 1
        want = (
            [tuple(parameter.shape)]
            if isinstance(root, Elementwise)
            else [(rows,), (parameter.numel() // max(1, rows),)]
        )
        got = [tuple(t.shape) for t in root.tensors]
        if got != want:
            raise ValueError(
                f"preconditioner: {name!r} has shape {' and '.join(map(str, got))}; pass {' and '.join(map(str, want))}"
            )
        roots[name] = root.to(dtype, device)
        if not all(t.isfinite().all() for t in roots[name].tensors):
            raise ValueError(f"preconditioner: {name!r} has values that are not finite as {dtype}; check its moments")
    return roots, weights_digest([t for root in roots.values() for t in root.tensors])


# ---------------------------------------------------------------------------------------------------------------
# From optimizers


def from_optimizer(
    optimizer: torch.optim.Optimizer | Mapping[str, Any] | None,
    model: nn.Module,
    kind: Kind = "adam",
    *,
    names: Sequence[str] | None = None,
) -> dict[str, Root] | None:
    """Square roots of an optimizer's metric, by parameter name.

    ``"adam"`` (Adam, AdamW): ``P = 1 / (sqrt(v_hat) + eps)`` with the bias-corrected second moment; with amsgrad its
    running maximum. ``"adafactor"``: ``P = max(v, eps1^2)^-1/2`` with ``v = r_i c_j / mean(r)`` for matrices, the plain
    second moment for vectors. ``"sgd"``: None, the plain inner product. Momentum is ignored.

    Args:
        optimizer: a torch.optim Adam, AdamW or Adafactor, or its state dict (``Checkpoint.optimizer``).
        model: the model it trains; its weights do not matter.
        kind: one of the above.
        names: names of the optimizer's parameters in its order, where a state dict does not tell: it has several
            parameter groups, or not the model's (trainable) parameters in the model's order.

    Returns:
        A mapping for ``preconditioner=`` of :func:`~stepinfluence.attach`; parameters without state are left out.

    Raises:
        CheckpointError: no state, state of another kind or model, or an order that cannot be told.
        TypeError, ValueError: ``optimizer`` or ``kind`` is none of the above.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}; use one of {', '.join(map(repr, KINDS))}")
    if kind == "sgd":
        return None
    if optimizer is None:
        raise CheckpointError("optimizer: got None; the checkpoint has no optimizer state, save it beside the model")
    parameters = {canonical_name(name): p for name, p in unwrap(model).named_parameters()}
    if not isinstance(optimizer, torch.optim.Optimizer | Mapping):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}; pass a torch optimizer or its state dict")
    read = adam_root if kind == "adam" else _adafactor
    with border(f"optimizer: its state is not readable as {kind}'s"):
        if isinstance(optimizer, torch.optim.Optimizer):
            states = _of_object(optimizer, parameters)
        else:
            states = of_state_dict(optimizer, parameters, names)
        roots = {name: read(name, parameters[name], group, state) for name, group, state in states if state}
    if not roots:
        raise CheckpointError(f"optimizer: holds no {kind} state of this model's parameters (has it taken a step?)")
    return roots


States: TypeAlias = Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]
"""(parameter name, its group's options, its state)"""


def _of_object(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> States:
    name_of = {id(p): name for name, p in parameters.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in name_of:
                yield name_of[id(parameter)], group, optimizer.state.get(parameter, {})


def of_state_dict(
    content: Mapping[str, Any], parameters: Mapping[str, Tensor], given: Sequence[str] | None = None
) -> States:
    """A state dict's parameters by name, with their group's options and their state.

    Raises:
        CheckpointError: it is no optimizer's, or the order of its parameters cannot be told.
    """
    groups, states = content.get("param_groups"), content.get("state")
    if not isinstance(states, Mapping) or not isinstance(groups, list | tuple) or not groups:
        raise CheckpointError("optimizer: not an optimizer's state dict (no 'state' and 'param_groups')")
    keys = [key for group in groups for key in group["params"]]
    names = _order(groups, keys, parameters, given)
    unknown = next((name for name in names if name not in parameters), None)
    if unknown is not None:
        raise CheckpointError(f"optimizer: its parameter {unknown!r} is not in the model; pass the model it trained")
    group_of = [group for group in groups for _ in group["params"]]
    for key, name, group in zip(keys, names, group_of, strict=True):
        yield name, group, states.get(key, {})


def _order(
    groups: Sequence[Mapping[str, Any]],
    keys: Sequence[Any],
    parameters: Mapping[str, Tensor],
    given: Sequence[str] | None,
) -> list[str]:
    """Names of a state dict's parameters, in its order."""
    if given is None and all("param_names" in group for group in groups):  # made with model.named_parameters()
        given = [name for group in groups for name in group["param_names"]]
    if given is None and all(isinstance(key, str) for key in keys):  # torch.distributed.checkpoint's state dicts
        given = keys
    if given is not None:
        if len(given) != len(keys):
            raise CheckpointError(f"names: got {len(given)} for the optimizer's {len(keys)} parameters; name each")
        return [canonical_name(name).removeprefix("module.") for name in given]
    # Several groups are usually split by kind of parameter: concatenated they are not in the model's order, and
    # moments of equal shape would be exchanged unnoticed.
    if len(groups) == 1:
        for candidates in (list(parameters), [name for name, p in parameters.items() if p.requires_grad]):
            if len(candidates) == len(keys):
                return candidates
    raise CheckpointError(
        f"optimizer: its state dict has {len(keys)} parameters in {len(groups)} group(s) and no names, the model has "
        f"{len(parameters)} parameters; pass names= in the optimizer's order, or the optimizer itself"
    )


def _moment(name: str, state: Mapping[str, Any], key: str, shape: tuple[int, ...], kind: str) -> Tensor:
    value = state.get(key)
    if not isinstance(value, Tensor) or "step" not in state:
        raise CheckpointError(
            f"optimizer: {name} has no {kind} state ({key!r} and 'step'), it holds {', '.join(sorted(state))}; "
            "pass the kind of optimizer that trained the model"
        )
    if tuple(value.shape) != shape:
        raise CheckpointError(
            f"optimizer: {key} of {name} has shape {tuple(value.shape)}, not {shape}; pass the model it trained, and "
            "names= if its parameters are in another order"
        )
    if not value.is_floating_point() or value.layout != torch.strided or value.device.type == "meta":
        raise CheckpointError(f"optimizer: {key} of {name} is no plain tensor of real numbers ({value.dtype})")
    if not bool((value >= 0).all()) or not bool(value.isfinite().all()):
        raise CheckpointError(f"optimizer: {key} of {name} has entries that are negative or not finite")
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def adam_root(name: str, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Elementwise:
    """Of one parameter, from Adam's options and state.

    Raises:
        CheckpointError: they are not Adam's (says what is missing).
    """
    key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    moment = _moment(name, state, key, tuple(parameter.shape), "Adam")
    if "betas" not in group or "eps" not in group:
        raise CheckpointError(f"optimizer: the parameter group of {name} has no betas and eps; pass Adam's state")
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    if correction <= 0:
        raise CheckpointError(f"optimizer: {name} has taken no step; pass the state after at least one")
    return Elementwise(((moment / correction).sqrt() + float(group["eps"])).rsqrt())


def _adafactor(name: str, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Root:
    shape = tuple(parameter.shape)
    wanted = {"variance": shape}
    if len(shape) > 1:
        wanted = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
    row, *others = (_moment(name, state, key, size, "Adafactor") for key, size in wanted.items())
    eps = group.get("eps")
    if not isinstance(eps, list | tuple):
        raise CheckpointError(f"optimizer: the parameter group of {name} has no pair eps; pass Adafactor's state")
    eps1 = torch.finfo(parameter.dtype).eps if eps[0] is None else float(eps[0])
    if not others:
        return Elementwise(row.clamp(min=eps1**2) ** -0.25)
    (column,) = others
    row = row / row.mean(-2, keepdim=True).clamp(min=eps1)
    # The lower limit on single entries is no outer product; it matters where a row or column has had no gradient.
    if len(shape) == 2 and float(row.min()) * float(column.min()) >= eps1**2:
        return Factored(row[:, 0] ** -0.25, column[0] ** -0.25)
    return Elementwise((row * column).clamp(min=eps1**2) ** -0.25)
