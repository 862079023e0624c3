"""The text of a report: an experiment's ``report.md.j2``, filled with the values that its analysis returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """Markdown of a report, without its title.

    Attributes:
        summary: the template's block ``summary``: two to five sentences at the beginning.
        body: its block ``body``: sections with their tables and figures.
    """

    summary: str
    body: str


def fill(
    experiment: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., object]] | None = None
) -> Text:
    """Fill ``reproduce/<experiment>/report.md.j2``.

    Args:
        experiment: name of its package.
        values: what the template speaks of; a name that is missing is an error.
        filters: further filters, beside Python's ``format`` as ``fmt``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Markdown, not HTML: nothing is escaped here, and the page made of it takes raw HTML for text.
    environment = Environment(
        loader=PackageLoader(f"reproduce.{experiment}", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701
    )
    environment.filters.update({"fmt": format, **(filters or {})})
    template = environment.get_template("report.md.j2")
    summary, body = (
        "".join(template.blocks[name](template.new_context(dict(values)))).strip() for name in ("summary", "body")
    )
    return Text(summary, body)
