"""Running a project file and looking at its functions: what is wrong is said with the line of the file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from stepinfluence.errors import ProjectError


def arguments_of(signature: str) -> int:
    """How many arguments the function of a signature (``name(a, b) -> ...``) is called with."""
    inner = signature[signature.index("(") + 1 : signature.index(")")]
    return len(inner.split(",")) if inner else 0


def describe(error: BaseException, file: Path) -> str:
    """``TypeError: message (line 12)``: an error with the last line of ``file`` that led to it."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file.absolute()]
    place = f" (line {lines[-1]})" if lines else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def run_file(path: Path) -> ModuleType:
    """The module that a project file is. Its folder is on ``sys.path`` from then on.

    Raises:
        ProjectError: no such file, or it raises an error (names the line).
    """
    if not path.is_file():
        hint = "; sdi init writes one" if path.suffix == ".py" else "; give a Python file (sdi init writes one)"
        raise ProjectError(f"{path}: no such project file{hint}")
    path = path.absolute()
    folder = str(path.parent)
    if folder not in sys.path:  # the file may import its neighbours, as it may when it is run as a script
        sys.path.insert(0, folder)
    # A name of its own: it must not hide, or be hidden by, an installed module of the same name.
    name = f"_sdi_project_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ProjectError(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pickle look modules up there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        if before is None:
            sys.modules.pop(name)
        else:
            sys.modules[name] = before
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ProjectError(f"{path}: could not be run: {describe(error, path)}") from error
    return module


def checked(path: Path, name: str, value: object, signature: str) -> Callable[..., Any]:
    """A function of the file, if it is one and takes the arguments of ``signature``.

    Raises:
        ProjectError: it is not (says what is expected).
    """
    if not callable(value) or isinstance(value, type | nn.Module):
        raise ProjectError(f"{path}: {name} is {kind_of(value)}, not a function; write def {signature}")
    try:
        inspect.signature(value).bind(*[None] * arguments_of(signature))
    except TypeError:
        raise ProjectError(
            f"{path}: {name}{inspect.signature(value)} does not take the right arguments; write def {signature}"
        ) from None
    except ValueError:  # built in C: it does not tell its arguments
        pass
    return value


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    return (
        "None" if value is None else f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    )
