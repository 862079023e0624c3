"""Packages whose public names are imported at their first use, so that what needs no torch does not wait for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazily(
    package: str, homes: Mapping[str, Sequence[str]], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562)::

        __getattr__, __dir__ = lazily(__name__, {"package.module": ("function", "Class")})

    No name may be that of a module in the package: once that is imported, it would take the name's place.

    Args:
        package: its name.
        homes: module -> names that are its own.
        modules: name -> module that it stands for.
    """
    home = {name: module for module, names in homes.items() for name in names}
    whole = dict(modules or {})

    def get(name: str) -> Any:
        if name in whole:
            value = import_module(whole[name])
        elif name in home:
            value = getattr(import_module(home[name]), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return get, names
