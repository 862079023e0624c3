"""What a page may ask its server, by the last part of the address, and how the fields of a question are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from stepinfluence.app.view.explore import everything
from stepinfluence.app.view.explore.agreement import agreement, errors
from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.model import exact, tokens
from stepinfluence.app.view.explore.scored import What

Fields: TypeAlias = Mapping[str, str]
Question: TypeAlias = Callable[[Fields], dict[str, Any]]


def questions_of(explorer: Explorer) -> dict[str, Question]:
    """Functions from the fields of an address to an answer.

    They raise ValueError for fields that are none, and what the answers raise.
    """
    return {
        "overview": lambda _: explorer.overview(),
        "queries": lambda f: explorer.queries(
            find=f.get("find", ""), offset=whole(f, "offset", 0), limit=whole(f, "limit", 100)
        ),
        "example": lambda f: explorer.example(f.get("side", "train"), whole(f, "row")),
        "curve": lambda f: explorer.curve(whole(f, "query"), **_part(f)),
        "top": lambda f: top_with_errors(explorer, _what(f), k=whole(f, "k", 10), **_steps(f)),
        "agreement": lambda f: agreement(explorer, _what(f), k=whole(f, "k", 10), **_steps(f)),
        "pair": lambda f: explorer.pair(whole(f, "query"), whole(f, "train"), **_score(f)),
        "compare": lambda f: explorer.compare(whole(f, "query"), whole(f, "other"), **_score(f)),
        "overall": lambda f: everything.overall(
            explorer, k=whole(f, "k", 20), weights=f.get("weights", "alike"), **_steps(f), **_part(f)
        ),
        "reverse": lambda f: everything.reverse(explorer, whole(f, "train"), k=whole(f, "k", 10), **_score(f)),
        "exact": lambda f: exact(
            explorer,
            whole(f, "query"),
            k=whole(f, "k", 10),
            parameters=f.get("parameters", ""),
            checkpoint=_checkpoint(f),
            **_steps(f),
        ),
        "tokens": lambda f: tokens(explorer, whole(f, "query"), whole(f, "train"), **_part(f)),
    }


def top_with_errors(
    explorer: Explorer, what: What, *, k: int = 10, first: int = 1, last: int | None = None
) -> dict[str, Any]:
    """:meth:`.Explorer.top` with the standard errors of the scores where there are any: of each one's score
    (``error``) and by step (``errors``)."""
    found = explorer.ranked(what, k=k, first=first, last=last)
    known = errors(explorer, what, [e["row"] for side in found.values() for e in side], first=first, last=last)
    return {
        side: [
            {**e, "error": known[e["row"]][0], "errors": known[e["row"]][1]} if e["row"] in known else e for e in some
        ]
        for side, some in found.items()
    }


def whole(fields: Fields, name: str, default: int | None = None) -> int:
    """A whole number among the fields.

    Raises:
        ValueError: it is missing and has no default, or is none.
    """
    given = fields.get(name)
    if given is None and default is not None:
        return default
    try:
        return int(given or "")
    except ValueError:
        raise ValueError(f"{name}: got {given!r}; give a whole number") from None


def _checkpoint(fields: Fields) -> int | None:
    return whole(fields, "checkpoint") if fields.get("checkpoint") else None


def _score(fields: Fields) -> dict[str, Any]:
    return {"score": fields.get("score", ""), "checkpoint": _checkpoint(fields)}


def _what(fields: Fields) -> What:
    return What(whole(fields, "query"), **_part(fields))


def _part(fields: Fields) -> dict[str, Any]:
    return {**_score(fields), "parameters": fields.get("parameters", "")}


def _steps(fields: Fields) -> dict[str, Any]:
    last = fields.get("last")
    return {"first": whole(fields, "first", 1), "last": whole(fields, "last") if last is not None else None}
