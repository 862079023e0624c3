"""A fitted Fisher on disk: its eigenvectors, and a sealed description that holds their checksum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stepinfluence.attribution.curvature.factors import Factor
from stepinfluence.attribution.curvature.fisher import KINDS, Curvature
from stepinfluence.attribution.curvature.unrolled import Segment, Unrolled
from stepinfluence.attribution.space import Block, FeatureSpace
from stepinfluence.errors import StoreError
from stepinfluence.files import (
    file_digest,
    make_folder,
    read_sealed,
    save_tensors,
    sealed,
    write_atomically,
    write_bytes,
)
from stepinfluence.writers import unknown_files

FORMAT, UNROLLED_FORMAT = "sdi-fisher-1", "sdi-source-1"
FILE, DESCRIPTION = "fisher.safetensors", "fisher.json"
DESCRIPTION_LIMIT = 64 << 20


def save(curvature: Curvature, path: str | Path, *, of: str = "") -> None:
    """Keep a fitted curvature in a folder: a new one, or one that holds a curvature, which is replaced.

    Args:
        path: the folder, usually beside the store.
        of: digest of the rows that it was fitted to, for :func:`load` to compare.

    Raises:
        StoreError: the folder holds other files, or could not be written.
    """
    tensors, rest = _tensors(curvature.factors)
    description = {
        "kind": curvature.kind,
        "of": of,
        "rows": curvature.rows,
        "damping": curvature.damping,
        **({} if curvature.time is None else {"time": curvature.time}),
        "auto": curvature.auto,
        "errors": [None if math.isinf(error) else error for error in curvature.errors],
        "rest": rest,
        "columns": [[cut.start, cut.stop] for cut in curvature.columns],
        "space": _described(curvature.space),
    }
    _write(Path(path), FORMAT, description, tensors)


def save_unrolled(unrolled: Unrolled, path: str | Path, *, of: str = "") -> None:
    """Keep a fitted :class:`.Unrolled`, as :func:`save` keeps a curvature."""
    tensors, rest = _tensors([factor for factors in unrolled.factors for factor in factors])
    description = {
        "of": of,
        "segments": [
            {"checkpoints": list(s.checkpoints), "learning_rate": s.learning_rate, "updates": s.updates}
            for s in unrolled.segments
        ],
        "rest": rest,
        "columns": [[cut.start, cut.stop] for cut in unrolled.columns],
        "spaces": [_described(space) for space in unrolled.spaces],
    }
    _write(Path(path), UNROLLED_FORMAT, description, tensors)


def load(path: str | Path, *, of: str | None = None) -> Curvature:
    """A curvature that was kept in a folder.

    Args:
        of: digest of the rows that it has to be fitted to, as it was given to :func:`save`.

    Raises:
        StoreError: there is none, it is damaged, of another format version, or of other rows.
    """
    content, tensors = _read(Path(path), FORMAT, of)
    with _valid(path):
        return _parsed(content, tensors)


def load_unrolled(path: str | Path, *, of: str | None = None) -> Unrolled:
    """An :class:`.Unrolled` that was kept in a folder; arguments and errors as for :func:`load`."""
    content, tensors = _read(Path(path), UNROLLED_FORMAT, of)
    with _valid(path):
        columns = tuple(slice(start, stop) for start, stop in content["columns"])
        segments = tuple(
            Segment(tuple(s["checkpoints"]), s["learning_rate"], s["updates"]) for s in content["segments"]
        )
        factors, each = _factors(content, tensors), len(columns)
        return Unrolled(
            segments,
            tuple(_space(space) for space in content["spaces"]),
            tuple(factors[k * each : (k + 1) * each] for k in range(len(segments))),
            columns,
        )


def _tensors(factors: Sequence[Factor]) -> tuple[dict[str, torch.Tensor], list[float]]:
    tensors = {}
    for k, factor in enumerate(factors):
        tensors[f"basis.{k}"] = factor.basis.cpu().contiguous()
        tensors[f"values.{k}"] = factor.values.cpu().contiguous()
    return tensors, [factor.rest for factor in factors]


def _described(space: FeatureSpace) -> dict[str, Any]:
    blocks = [{**dataclasses.asdict(block), "shape": list(block.shape)} for block in space.blocks]
    return {**dataclasses.asdict(space), "blocks": blocks}


def _write(path: Path, form: str, description: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    strange = unknown_files(path, (FILE, DESCRIPTION))
    if strange:
        raise StoreError(f"{path}: holds other files ({strange[0]}); give a new folder for the curvature")
    make_folder(path)
    # The description goes first and comes last: eigenvectors without one do not count.
    (path / DESCRIPTION).unlink(missing_ok=True)
    write_atomically(path / FILE, lambda aside: save_tensors(tensors, aside))
    write_bytes(path / DESCRIPTION, sealed({"format": form, **description, "file": file_digest(path / FILE)}))


def _read(path: Path, form: str, of: str | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not (path / DESCRIPTION).is_file():
        raise StoreError(f"{path}: no curvature here (it has no {DESCRIPTION}); fit one and save it")
    content = read_sealed(path / DESCRIPTION, DESCRIPTION_LIMIT)
    if content.get("format") != form:
        raise StoreError(f"{path}: its format is {content.get('format')!r}, not {form!r}; fit it again")
    if of is not None and content.get("of") != of:
        raise StoreError(f"{path}: fitted to other rows than these, or to this store before it changed; fit it again")
    file = path / FILE
    if not file.is_file() or file_digest(file) != content["file"]:
        raise StoreError(
            f"{file}: damaged: missing, or its bytes do not fit the checksum in {DESCRIPTION}; fit it again"
        )
    with _valid(path):
        return content, load_file(file)


@contextmanager
def _valid(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise StoreError(f"{path}: not a valid curvature ({error}); fit it again") from error


def _factors(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[Factor, ...]:
    return tuple(
        Factor(tensors[f"basis.{k}"], tensors[f"values.{k}"], float(rest)) for k, rest in enumerate(content["rest"])
    )


def _space(given: Mapping[str, Any]) -> FeatureSpace:
    return FeatureSpace(
        given["kind"],
        tuple(Block(b["name"], tuple(b["shape"]), b["start"], b["stop"]) for b in given["blocks"]),
        given["tables"],
        given["weights"],
        given["metric"],
        model_weights=given["model_weights"],
    )


def _parsed(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Curvature:
    return KINDS[content["kind"]](
        space=_space(content["space"]),
        rows=content["rows"],
        factors=_factors(content, tensors),
        columns=tuple(slice(start, stop) for start, stop in content["columns"]),
        damping=float(content["damping"]),
        auto=content["auto"],
        errors=tuple(math.inf if error is None else float(error) for error in content["errors"]),
        time=None if content.get("time") is None else float(content["time"]),
    )
