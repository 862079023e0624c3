"""Finding optimizer states in what a checkpoint holds: one, several, or a list of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

OPTIMIZER_KEYS = (
    "optimizer_state_dict", "optimizer", "optimizer_states", "optimizers", "optimizer_state_dicts", "optim",
    "optimizer_state",
)  # fmt: skip


def find_optimizer(content: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    """The optimizer's state dict in a checkpoint's content. Several optimizers become one with all their groups and
    states, in their order. None if there is none."""
    for key in OPTIMIZER_KEYS:
        found = list(_states(content.get(key)))
        if len(found) == 1:
            return found[0]
        if found:
            return _together(found)
    return None


def _states(value: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        if "param_groups" in value:
            yield value
        else:
            for part in value.values():
                yield from _states(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _states(part)


def _together(optimizers: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of parameters start at 0 in every optimizer: those of the later ones are moved on."""
    states: dict[Any, Any] = {}
    groups: list[dict[str, Any]] = []
    first = 0
    for optimizer in optimizers:
        keys = [key for group in optimizer["param_groups"] for key in group.get("params", ())]
        new = {key: first + k if isinstance(key, int) else key for k, key in enumerate(keys)}
        first += len(keys)
        groups += [{**g, "params": [new[key] for key in g.get("params", ())]} for g in optimizer["param_groups"]]
        states.update({new.get(key, key): state for key, state in (optimizer.get("state") or {}).items()})
    return {"state": states, "param_groups": groups}
