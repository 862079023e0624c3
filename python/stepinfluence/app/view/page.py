"""A self-contained page from a template, with what all pages have: style, script, plotly.js, data, a policy."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from stepinfluence.display.words import visible


def render(
    package: str,
    name: str,
    data: object,
    *,
    scripts: Sequence[str] = (),
    reach: str = "'none'",
    filters: Mapping[str, Callable[..., str]] | None = None,
    **values: Any,
) -> str:
    """A page as a string (about 5 MB, most of it plotly.js).

    Its content security policy forbids it to load anything (but what ``reach`` allows it to ask) and to run any script
    but its own.

    Args:
        package: whose ``assets`` has ``<name>.html.j2``, ``<name>.css`` and ``<name>.js``; style and script come after
            the ones that all pages share (``app/view/assets/base.*``).
        name: of the page.
        scripts: names of the page's scripts, where it has other ones than ``<name>.js``, in order.
        data: what its script draws, as JSON-able values.
        reach: source expression of what the page may ask: nothing, or ``'self'`` for one that has a server.
        filters: of the template, beside ``visible``.
        values: for the template.

    Raises:
        ModuleNotFoundError: plotly or jinja2 is not installed (the ``report`` extra).
    """
    from jinja2 import Environment, FileSystemLoader
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs().replace("\r\n", "\n")  # as browsers read it
    style = _asset(__package__, "base.css") + _asset(package, f"{name}.css")
    script = _asset(__package__, "base.js") + "".join(_asset(package, f"{part}.js") for part in scripts or (name,))
    environment = Environment(
        loader=FileSystemLoader(str(resources.files(package) / "assets")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"visible": visible, **(filters or {})})
    return environment.get_template(f"{name}.html.j2").render(
        style=style,
        plotly=plotly,
        script=script,
        data=embed(data),
        policy="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; base-uri 'none'; "
        f"form-action 'none'; connect-src {reach}; script-src {_allow(plotly)} {_allow(script)}",
        **values,
    )


def _asset(package: str, name: str) -> str:
    return (resources.files(package) / "assets" / name).read_text(encoding="utf-8")


def _allow(script: str) -> str:
    """Source expression of an inline script: browsers run it only if its text has this digest."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def embed(value: object) -> str:
    """JSON that is safe inside a ``<script>`` element: no markup can begin or end in it.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, escape)
    return text
