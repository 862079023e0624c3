"""What was measured on this GPU: tiles and rates, kept on disk for each GPU and each version of what made them.

``python -m bench.gpu.run --calibrate`` measures and writes the file; nothing is ever timed anywhere else. Without a
file, or with one that cannot be trusted (damaged, of another GPU or version, naming a tile that does not ship), the
shipped tiles and rates serve. The folder is ``$SDI_KERNELS_CACHE``, else ``$XDG_CACHE_HOME/sdi-kernels``, else
``~/.cache/sdi-kernels``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdi_kernels._version import __version__
from sdi_kernels.triton import configs, cost

FORMAT = "sdi-tuning-1"
CACHE_VARIABLE = "SDI_KERNELS_CACHE"


@dataclass(frozen=True)
class Tuning:
    """Tiles and rates in force on one device.

    Attributes:
        tiles: by the keys of :data:`configs.CANDIDATES`; what is missing is as shipped.
        rates: of the cost model.
        source: in words, where they come from.
    """

    tiles: Mapping[str, configs.Config] = field(default_factory=dict)
    rates: cost.Rates = cost.SHIPPED
    source: str = "estimates shipped with the package, not measured"

    def tile(self, key: str) -> configs.Config:
        return self.tiles.get(key, configs.SHIPPED[key])


SHIPPED = Tuning()


def machine(device: torch.device) -> dict[str, str]:
    """What a file is for: GPU and versions of torch, Triton and this package."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "gpu": torch.cuda.get_device_name(device), "torch": str(torch.__version__), "triton": triton,
        "sdi_kernels": __version__,
    }  # fmt: skip


def folder() -> Path:
    """Where tuning files live; not created by asking."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sdi-kernels"


def path(about: Mapping[str, str]) -> Path:
    """The file for a machine as :func:`machine` describes it."""
    parts = (re.sub(r"[^A-Za-z0-9.+]+", "_", about[key]) for key in ("gpu", "torch", "triton", "sdi_kernels"))
    return folder() / f"tuning-{'-'.join(parts)}.json"


def save(tuning: Tuning, about: Mapping[str, str]) -> Path:
    """Write the file for ``about``, whole or not at all, also with another process reading or writing it.

    Raises:
        OSError: the folder cannot be made or written.
    """
    target = path(about)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT, "machine": dict(about), "measured": time.strftime("%Y-%m-%d"),
        "tiles": {key: list(tile) for key, tile in tuning.tiles.items()}, "rates": asdict(tuning.rates),
    }  # fmt: skip
    handle, name = tempfile.mkstemp(prefix=target.name, suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _loaded.clear()
    return target


def load(about: Mapping[str, str]) -> Tuning:
    """The tuning of a machine; the shipped one, with a warning, where its file cannot be trusted."""
    file = path(about)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return SHIPPED
    except (OSError, UnicodeDecodeError) as problem:
        return _ignored(file, f"cannot be read ({problem})")
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return _ignored(file, f"is no {FORMAT} file")
        if content.get("machine") != dict(about):
            return _ignored(file, "was made on another machine or by other versions")
        tiles = {key: _tile(key, value) for key, value in content["tiles"].items()}
        rates = cost.Rates.from_json(content["rates"])
        measured = str(content["measured"])
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        return _ignored(file, f"is damaged ({type(problem).__name__}: {problem})")
    return Tuning(tiles, rates, f"measured on {about['gpu']}, {measured}: {file}")


def _tile(key: str, value: Any) -> configs.Config:
    for candidate in configs.CANDIDATES[key]:
        if list(candidate) == value:
            return candidate
    raise ValueError(f"{value} is no tile of {key!r}")


def _ignored(file: Path, why: str) -> Tuning:
    warnings.warn(
        f"{file} {why}: ignored, shipped tiles and rates are used; delete it, or measure again with "
        "python -m bench.gpu.run --calibrate",
        UserWarning,
        stacklevel=3,
    )
    return SHIPPED


_loaded: dict[int, Tuning] = {}


def _index(device: torch.device) -> int | None:
    """Which GPU ``device`` is; None if it is none that can be used."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def tuned(device: torch.device) -> Tuning:
    """The tuning in force on ``device``: its file is read once per process, at the first call that needs it.

    While torch.compile traces, which cannot read files, it is the shipped one: a compiled graph is planned by shipped
    rates. Its kernels are launched as any, with the tuned tiles.
    """
    if torch.compiler.is_compiling():
        return SHIPPED
    index = _index(device)
    if index is None:
        return SHIPPED
    if index not in _loaded:
        _loaded[index] = load(machine(torch.device("cuda", index)))
    return _loaded[index]


@contextlib.contextmanager
def using(tuning: Tuning, device: torch.device) -> Iterator[None]:
    """``tuning`` in force on a GPU while the block runs: for measuring."""
    index = _index(device)
    assert index is not None, device
    before = _loaded.get(index)
    _loaded[index] = tuning
    try:
        yield
    finally:
        _loaded.pop(index)
        if before is not None:
            _loaded[index] = before
