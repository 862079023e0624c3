"""An audit trail: a saved page that names the stores it was made from by their digests, and a way to check it.

The page's data hold, beside the answers, the digest of the training store and of the queries' (of manifest and commit
records, which hold the checksums of all files), and a seal: the SHA-256 of all of it. A seal is no signature: whoever
changes a page can seal it again. What cannot be had is a changed page that fits the stores: its scores are computed
from them again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.scored import SDI
from stepinfluence.errors import StoreError
from stepinfluence.files import parse_json, read_within
from stepinfluence.search.sources import StoreSource

DATA = re.compile(rb'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
LIMIT = 1 << 30
"""Bytes of a page, at most."""

TOLERANCE = 1e-4
"""Differences of a score from its recomputation, over the query's largest: sums in another order, on another CPU."""

SPLITS, DIGESTS, SEALED = "splits", "digests", "seal"
"""Fields of a saved page's overview."""


def digests(explorer: Explorer) -> dict[str, str]:
    """SHA-256 of the contents of both stores, in hex."""
    sides = {"train": explorer.train, "query": explorer.query}
    return {name: StoreSource(name, store).digest() for name, store in sides.items()}


def seal(overview: Mapping[str, Any], answers: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of what a page shows; its own field left out."""
    content = {"overview": {k: v for k, v in overview.items() if k != SEALED}, "answers": answers}
    return hashlib.sha256(json.dumps(content, allow_nan=False, sort_keys=True).encode()).hexdigest()


def sealed_overview(explorer: Explorer, answers: Mapping[str, Any]) -> dict[str, Any]:
    """:meth:`Explorer.overview` of a saved page, with digests and seal."""
    names = {"train": explorer.train.path.name, "query": explorer.query.path.name}
    overview = {**explorer.overview(), SPLITS: names, DIGESTS: digests(explorer)}
    # As the page has it: what JSON cannot tell apart must not be told apart by the seal.
    plain = json.loads(json.dumps({"overview": overview, "answers": answers}, allow_nan=False))
    return {**overview, SEALED: seal(plain["overview"], plain["answers"])}


def read_page(path: Path) -> dict[str, Any]:
    """``overview`` and ``answers`` of a page that ``sdi report`` wrote.

    Raises:
        StoreError: it cannot be read, or is no such page.
    """
    try:
        raw = read_within(path, LIMIT)
    except OSError as error:
        problem = f"could not be read ({error.strerror})"
        raise StoreError(f"report: {path} {problem}; give a file that sdi report wrote") from error
    found = DATA.search(raw)
    content = parse_json(str(path), found[1]) if found else None
    parts = [content.get(name) for name in ("overview", "answers")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise StoreError(f"report: {path} holds no answers of a run; give a file that sdi report wrote")
    return dict(zip(("overview", "answers"), parts, strict=True))


def splits(path: Path) -> tuple[str, str]:
    """Names of the splits of training examples and queries that a saved page was made from.

    Raises:
        StoreError: as for :func:`read_page`, or the page does not say.
    """
    told = read_page(path)["overview"].get(SPLITS)
    if not isinstance(told, dict) or not all(isinstance(told.get(name), str) for name in ("train", "query")):
        raise StoreError(f"report: {path} names no store: an older version wrote it; write it again with sdi report")
    return told["train"], told["query"]


def problems(explorer: Explorer, path: Path) -> list[str]:
    """What of a saved page does not fit the run, a line each; empty if all does.

    Compared are the seal, the stores' digests, and every SDI trajectory that the page shows of its queries, computed
    from the stores again (scores corrected for curvature are not: the seal alone covers them).

    Raises:
        StoreError: as for :func:`read_page`.
    """
    content = read_page(path)
    found = list(_problems(explorer, content["overview"], content["answers"]))
    if not found and not read_within(path, LIMIT).rstrip().endswith(b"</html>"):
        found.append("is cut short: write it again with sdi report")
    return [f"{path}: {problem}" for problem in found]


def _problems(explorer: Explorer, overview: Mapping[str, Any], answers: Mapping[str, Any]) -> Iterator[str]:
    told = overview.get(DIGESTS)
    if not isinstance(told, dict):
        yield "names no store: an older version wrote it; write it again with sdi report"
        return
    if overview.get(SEALED) != seal(overview, answers):
        yield "was changed since it was written: its seal does not fit what it shows"
    for name, digest in digests(explorer).items():
        if told.get(name) != digest:
            yield f"was made from another {name} store than {getattr(explorer, name).path}, or that has changed since"
    try:
        for row, query in answers["byQuery"].items():
            yield from _wrong_scores(explorer, int(row), query)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        yield f"its answers are not those that sdi report writes ({type(error).__name__}: {error})"


def _wrong_scores(explorer: Explorer, row: int, query: Mapping[str, Any]) -> Iterator[str]:
    """Trajectories of one query that the stores do not give."""
    asked = explorer.example("query", row)
    if query["example"] != json.loads(json.dumps(asked)):
        yield f"query {asked['id']}: its text, loss or answer is another in the store"
    truth = explorer.scores(row, score=SDI)[:, explorer.taken(row)]
    allowed = TOLERANCE * float(np.nanmax(np.abs(truth))) if truth.size else 0.0
    for example in query["scores"][SDI]["examples"]:
        shown, wanted = np.asarray(example["sdi"], dtype=np.float64), truth[example["row"]]
        named = explorer.sides["train"].short(example["row"])["id"]
        if example["id"] != named or shown.shape != wanted.shape or not (np.abs(shown - wanted) <= allowed).all():
            yield f"query {asked['id']}: influence of {named} (row {example['row']}) is another by the store"
