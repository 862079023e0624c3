"""Checks of arguments: one clear line that names the argument and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import SupportsFloat


def positive_int(name: str, value: object) -> int:
    """``value`` as an int >= 1, or a ``TypeError``/``ValueError`` naming the argument."""
    return _int_at_least(name, value, 1, "positive")


def non_negative_int(name: str, value: object) -> int:
    """``value`` as an int >= 0, or a ``TypeError``/``ValueError`` naming the argument."""
    return _int_at_least(name, value, 0, "non-negative")


def _int_at_least(name: str, value: object, least: int, word: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}; pass a {word} int")
    if value < least:
        raise ValueError(f"{name}: got {value}; pass a {word} int")
    return value


def positive_float(name: str, value: object) -> float:
    """``value`` as a finite float > 0, or a ``TypeError``/``ValueError`` naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}; pass a positive number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}; pass a positive, finite number")
    return float(value)


def per_checkpoint(name: str, value: object, count: int) -> list[float]:
    """A finite number for each of ``count`` checkpoints, from one number or one each.

    Raises:
        TypeError, ValueError: something else (names the argument).
    """
    several = isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0
    given = list(value) if several else [value] * count  # type: ignore[call-overload]
    if len(given) != count:
        raise ValueError(f"{name}: got {len(given)} for {count} checkpoints; give one per checkpoint")
    found = []
    for one in given:
        if isinstance(one, bool | str) or not isinstance(one, SupportsFloat):
            raise TypeError(f"{name}: got {type(one).__name__} {one!r}; give a number, or one per checkpoint")
        found.append(float(one))
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{name}: got {found}; give finite numbers")
    return found


def boolean(name: str, value: object) -> None:
    """``TypeError`` unless ``value`` is True or False: any other would count as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}; pass True or False")


def function(name: str, value: object, form: str) -> None:
    """``TypeError`` unless ``value`` can be called; ``form`` says how."""
    if not callable(value):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}; pass a function {form}")


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; pass one of {', '.join(map(repr, choices))}")


def heads_divide(d_model: int, n_heads: int) -> None:
    """``ValueError`` unless the model width splits evenly over the attention heads."""
    if d_model % n_heads:
        raise ValueError(f"n_heads: {n_heads} heads do not divide d_model={d_model}; pass a divisor of d_model")
