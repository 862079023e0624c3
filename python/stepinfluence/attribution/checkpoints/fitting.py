"""A state dict put into a model whose names are not quite the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.errors import CheckpointError
from stepinfluence.shards import local, share_of
from stepinfluence.wrappers import canonical_name, unwrap

DERIVED = re.compile(r"(^|\.)(inv_freq|original_inv_freq|masked_bias)$")
"""Buffers with values that are computed from a config, which older versions of libraries saved."""

ADAPTER = re.compile(r"(\.(?:lora|adapter|ia3|vera|dora)_[^.]*)\.[^.]+(?=\.|$)|(\.modules_to_save)\.[^.]+(?=\.)")
"""An adapter's name within a model that may hold several; files of adapters leave it out."""


def fit(path: Path, state: Mapping[str, Tensor], model: nn.Module, *, strict: bool, needed: Iterable[str]) -> None:
    """Load ``state`` into ``model``; arguments and errors as for ``Checkpoint.load_into``."""
    model = unwrap(model)
    own = {canonical_name(name): (name, value) for name, value in model.state_dict(keep_vars=True).items()}
    parameters = {canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    aliases = _aliases({name: value for name, (_, value) in own.items()})
    optional = {name for name, (_, value) in own.items() if name not in parameters and not _holds_weights(value, name)}
    required = own.keys() - optional
    known = {canonical_name(name) for name, _ in model.named_buffers()}
    state = _renamed(path, state, required, aliases, strict=strict)
    state = _with_aliases(path, state, own, aliases)
    missing = sorted(required - state.keys())
    extra = sorted(n for n, v in state.items() if n not in own and n not in known and _holds_weights(v, n))
    if strict and (missing or extra):
        parts = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("has unknown", extra)) if names]
        hint = _hint(state, own)
        raise CheckpointError(f"{path}: does not fit the model: it {' and '.join(parts)}{hint}")
    lacking = sorted({canonical_name(name) for name in needed} - state.keys())
    if lacking:
        raise CheckpointError(
            f"{path}: lacks {_some(lacking)} of the loop body, whose weights influence is measured on; pass a "
            "checkpoint that holds all of the body's trainable weights"
        )
    if not state.keys() & own.keys():
        raise CheckpointError(f"{path}: does not fit the model: it has none of its weights, only {_some([*state])}")
    for name in state.keys() & own.keys():
        value = own[name][1]
        if isinstance(value, Tensor) and value.shape != state[name].shape:
            raise CheckpointError(
                f"{path}: does not fit the model: {name} has shape {tuple(state[name].shape)}, "
                f"the model's is {tuple(value.shape)}"
            )
        if isinstance(value, Tensor) and (why := _unusable(state[name], value)) is not None:
            raise CheckpointError(f"{path}: does not fit the model: {name} {why}; save plain weights")
    model.load_state_dict({own[n][0]: share_of(v, own[n][1]) for n, v in state.items() if n in own}, strict=False)


def _unusable(given: Any, own: Tensor) -> str | None:
    """Why a value cannot be copied into a tensor of the model: torch would copy others before it finds out."""
    if not isinstance(given, Tensor):
        return f"is {type(given).__name__}, no tensor"
    if given.device.type == "meta":
        return "has no values (it is on the meta device)"
    if given.is_quantized or given.is_nested or given.layout != own.layout:
        return "is quantised" if given.is_quantized else f"has layout {given.layout}, the model's has {own.layout}"
    if given.is_complex() and not own.is_complex():
        return "is complex, the model's is real"
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _holds_weights(value: Any, name: str = "") -> bool:
    """Whether a value matters: masks, positions and counts are whole numbers and truth values; extra states count."""
    if not isinstance(value, Tensor):
        return True
    return (value.is_floating_point() or value.is_complex()) and not DERIVED.search(name)


def _aliases(own: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the same tensor, for each name of a tied weight."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, value in own.items():
        if isinstance(value, Tensor) and local(value).numel() and value.device.type != "meta":
            part = local(value)
            place = value.device, part.untyped_storage().data_ptr(), part.storage_offset()
            key = (*place, value.shape, value.stride())
            groups.setdefault(key, []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}


def _with_aliases(
    path: Path, state: Mapping[str, Tensor], own: Mapping[str, Any], aliases: Mapping[str, Sequence[str]]
) -> dict[str, Tensor]:
    full = dict(state)
    for names in {id(group): group for group in aliases.values()}.values():
        there = [name for name in names if name in state]
        for name in there[1:]:
            one, other = state[name], state[there[0]]
            if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other):
                raise CheckpointError(
                    f"{path}: does not fit the model: {there[0]} and {name} are one tensor in the model and two "
                    "different ones in the file; untie them in the model"
                )
        if there:
            full.update({name: state[there[0]] for name in names if name in own})
    return full


def _covers(names: Iterable[str], required: Iterable[str], aliases: Mapping[str, Sequence[str]]) -> bool:
    """Whether all required names are there, tied ones by any of their names."""
    names = set(names)
    return all(name in names or not names.isdisjoint(aliases.get(name, ())) for name in required)


def _renamed(
    path: Path,
    state: Mapping[str, Tensor],
    required: Iterable[str],
    aliases: Mapping[str, Sequence[str]],
    *,
    strict: bool,
) -> Mapping[str, Tensor]:
    """The state under the model's names, without other parts of what wrapped the model."""
    required = set(required)
    if _covers(state, required, aliases):
        return state
    one = max(required, key=len, default="")
    stems = {name[: -len(w)] for w in (one, *aliases.get(one, ())) for name in state if name.endswith(f".{w}")}
    fitting = sorted(
        stem
        for stem in stems
        if _covers((n.removeprefix(stem) for n in state if n.startswith(stem)), required, aliases)
    )
    if len(fitting) > 1:
        raise CheckpointError(
            f"{path}: holds several models of these names, under the prefixes {', '.join(map(repr, fitting[:3]))}; "
            "save the one that is meant by itself"
        )
    if fitting:
        (stem,) = fitting
        return {n.removeprefix(stem): v for n, v in state.items() if n.startswith(stem)}
    # The other way round: the model wraps what was saved.
    common = {name.split(".")[0] for name in required}
    if len(common) == 1:
        longer = {f"{next(iter(common))}.{name}": value for name, value in state.items()}
        if _covers(longer, required, aliases):
            return longer
    return state if strict else _adapters(state, required)


def _adapters(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """A file with a part of the weights under the model's names: adapters' names are put in."""
    of_short = {ADAPTER.sub(lambda m: m.group(1) or m.group(2), name): name for name in own}
    return {of_short.get(name, name): value for name, value in state.items()}


def _hint(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> str:
    """What may be the matter with names that do not fit."""
    if state and all(name.endswith(tuple(own)) for name in state) and not state.keys() & own.keys():
        return "; its names have a prefix of their own"
    if any("lora_" in name for name in state):
        return "; it holds adapters only: load the base model first and pass strict=False"
    return ""
