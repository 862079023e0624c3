"""A fitted Fisher on disk: its eigenvectors, and a sealed description that holds their checksum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stepinfluence.attribution.curvature.choice import KINDS
from stepinfluence.attribution.curvature.factors import Factor
from stepinfluence.attribution.curvature.fisher import Curvature
from stepinfluence.attribution.features import Block, FeatureSpace
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

FORMAT = "sdi-fisher-1"
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
    path = Path(path)
    strange = unknown_files(path, (FILE, DESCRIPTION))
    if strange:
        raise StoreError(f"{path}: holds other files ({strange[0]}); give a new folder for the curvature")
    make_folder(path)
    # The description goes first and comes last: eigenvectors without one do not count.
    (path / DESCRIPTION).unlink(missing_ok=True)
    tensors = {}
    for k, factor in enumerate(curvature.factors):
        tensors[f"basis.{k}"] = factor.basis.cpu().contiguous()
        tensors[f"values.{k}"] = factor.values.cpu().contiguous()
    write_atomically(path / FILE, lambda aside: save_tensors(tensors, aside))
    space = curvature.space
    description = {
        "format": FORMAT,
        "kind": curvature.kind,
        "of": of,
        "rows": curvature.rows,
        "damping": curvature.damping,
        **({} if curvature.time is None else {"time": curvature.time}),
        "auto": curvature.auto,
        "errors": [None if math.isinf(error) else error for error in curvature.errors],
        "rest": [factor.rest for factor in curvature.factors],
        "columns": [[cut.start, cut.stop] for cut in curvature.columns],
        "space": {
            **dataclasses.asdict(space),
            "blocks": [{**dataclasses.asdict(block), "shape": list(block.shape)} for block in space.blocks],
        },
        "file": file_digest(path / FILE),
    }
    write_bytes(path / DESCRIPTION, sealed(description))


def load(path: str | Path, *, of: str | None = None) -> Curvature:
    """A curvature that was kept in a folder.

    Args:
        of: digest of the rows that it has to be fitted to, as it was given to :func:`save`.

    Raises:
        StoreError: there is none, it is damaged, of another format version, or of other rows.
    """
    path = Path(path)
    if not (path / DESCRIPTION).is_file():
        raise StoreError(f"{path}: no curvature here (it has no {DESCRIPTION}); fit one and save it")
    content = read_sealed(path / DESCRIPTION, DESCRIPTION_LIMIT)
    if content.get("format") != FORMAT:
        raise StoreError(f"{path}: its format is {content.get('format')!r}, not {FORMAT!r}; fit it again")
    if of is not None and content.get("of") != of:
        raise StoreError(f"{path}: fitted to other rows than these, or to this store before it changed; fit it again")
    file = path / FILE
    if not file.is_file() or file_digest(file) != content["file"]:
        raise StoreError(
            f"{file}: damaged: missing, or its bytes do not fit the checksum in {DESCRIPTION}; fit it again"
        )
    try:
        return _parsed(content, load_file(file))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise StoreError(f"{path}: not a valid curvature ({error}); fit it again") from error


def _parsed(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Curvature:
    given = content["space"]
    blocks = tuple(Block(b["name"], tuple(b["shape"]), b["start"], b["stop"]) for b in given["blocks"])
    return KINDS[content["kind"]](
        space=FeatureSpace(
            given["kind"],
            blocks,
            given["tables"],
            given["weights"],
            given["metric"],
            model_weights=given["model_weights"],
        ),
        rows=content["rows"],
        factors=tuple(
            Factor(tensors[f"basis.{k}"], tensors[f"values.{k}"], float(rest)) for k, rest in enumerate(content["rest"])
        ),
        columns=tuple(slice(start, stop) for start, stop in content["columns"]),
        damping=float(content["damping"]),
        auto=content["auto"],
        errors=tuple(math.inf if error is None else float(error) for error in content["errors"]),
        time=None if content.get("time") is None else float(content["time"]),
    )
