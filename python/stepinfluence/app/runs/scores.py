"""A run's whole score table on disk: ``influence.npy``, and ``influence.json`` that says what is in it.

The description is the commit record of both: it is written last, with size and SHA-256 of the scores and a checksum of
its own, and removed before they are replaced. Scores without a description, or with one that does not fit, do not
count.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from stepinfluence.attribution.space import Parameters
from stepinfluence.errors import StoreError
from stepinfluence.files import file_digest, read_sealed, reason, remove, sealed, sync_folder, write_bytes
from stepinfluence.writers import aside, remove_leftovers

if TYPE_CHECKING:
    from stepinfluence.app.runs.curvatures import Correction
    from stepinfluence.attribution.curvature import Choice
    from stepinfluence.store import Store

SCORES = "influence.npy"
"""The name of a run's score table, unless another is given."""

LIMIT = 1 << 32
"""Bytes of a description that are read, at most."""


def description_path(path: Path) -> Path:
    """The file that says what is in a score table."""
    return path.with_suffix(".json")


def write_scores(
    train: Store,
    query: Store,
    path: Path,
    *,
    parameters: Parameters,
    device: str | None,
    progress: bool,
    curvature: Correction | None = None,
) -> list[int]:
    """Write the influence of all rows of ``train`` on all of ``query`` to a ``.npy`` file and its description.

    Args:
        curvature: that scores are corrected with; None for SDI.
        train, query, parameters, device, progress: as for :func:`stepinfluence.search.scores`.

    Killed at any moment, there are the scores and the description of one call, or no description.

    Returns:
        The shape ``(n_train, n_query, steps)``.

    Raises:
        StoreError: a file could not be written; a store is incomplete or damaged.
        FeatureMismatchError, ValueError: as for :func:`stepinfluence.search.scores`.
    """
    from stepinfluence.app.runs.curvatures import score_named  # to check a table takes no torch
    from stepinfluence.search import scores

    if path.suffix != ".npy":
        raise ValueError(f"out: got {str(path)!r}; give a file name that ends in .npy")
    remove_leftovers(path.parent)
    made, beside = aside(path), description_path(path)
    if beside.is_file() and path.name != SCORES and not _is_description(beside):
        raise ValueError(
            f"out: the ids go into {beside}, which is there and holds something else, or is damaged; give another name"
        )
    try:
        choice: Choice = "none" if curvature is None else curvature
        result = scores(
            train, query, out=made, parameters=parameters, curvature=choice, device=device, progress=progress
        )
        shape = list(result.sdi.shape)
        file = {"name": path.name, "bytes": made.stat().st_size, "sha256": file_digest(made)}
        remove(beside)
        try:
            made.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            raise StoreError(f"{path}: could not be written ({reason(error)}); mend the folder, and rerun") from error
    finally:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)
    content = {
        "scores": file,
        "shape": shape,
        "axes": ["n_train", "n_query", "steps"],
        "sign": "positive score = training on the row lowers the query's loss",
        "failed": "rows and columns of examples without features are NaN",
        "score": score_named(curvature),
        "parameters": parameters,
        "etas": list(result.etas),
        "train": {"store": train.path.name, "ids": list(train.ids)},
        "query": {"store": query.path.name, "ids": list(query.ids)},
    }
    write_bytes(beside, sealed(content))
    return shape


def _is_description(path: Path) -> bool:
    with contextlib.suppress(StoreError):
        return "scores" in read_sealed(path, LIMIT)
    return False


def scores_problem(path: Path) -> str | None:
    """What is wrong with a score table, in one line; None if it and its description are of one call."""
    beside = description_path(path)
    if not beside.is_file():
        return f"{path}: has no {beside.name}: sdi influence was stopped while it wrote; run it again"
    try:
        told = read_sealed(beside, LIMIT)["scores"]
        whole = path.is_file() and (path.stat().st_size, file_digest(path)) == (told["bytes"], told["sha256"])
    except (StoreError, OSError, KeyError, TypeError) as error:
        return f"{beside}: damaged, or written by an earlier version ({error}); run sdi influence again"
    return None if whole else f"{path}: not the scores that {beside.name} describes; run sdi influence again"
