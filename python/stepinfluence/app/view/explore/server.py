"""A local server over one run. Reads only, serves only its run, and answers only pages of its own address."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.page import render_page
from stepinfluence.app.view.explore.questions import Question, questions_of, whole
from stepinfluence.display.words import harmless

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",  # what a page's own policy cannot say
}


class SameOrigin:
    """Refuses requests that another site's page makes: a browser says so in ``Origin`` or ``Sec-Fetch-Site``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 403."""
        if scope["type"] == "http":
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            origin, host = headers.get("origin"), headers.get("host", "")
            # A link or a typed address (navigate) may come from anywhere: it shows the page and hands out nothing.
            foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
            followed = headers.get("sec-fetch-mode") == "navigate" and scope["path"] == "/"
            if (origin is not None and origin != f"{scope['scheme']}://{host}") or (foreign and not followed):
                await JSONResponse({"error": "origin: another site may not read this"}, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def make_app(explorer: Explorer, *, hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]", "::1")) -> Starlette:
    """The ASGI application.

    Args:
        explorer: what it answers from.
        hosts: names that a request may address it by (``Host`` header), against pages that rebind their name to this
            machine.
    """
    page = render_page(as_json(explorer.overview()))

    async def index(_: Request) -> Response:
        return HTMLResponse(page, headers=HEADERS)

    def answers(compute: Question) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                result = await run_in_threadpool(compute, request.query_params)
            except (ValueError, IndexError) as error:
                return JSONResponse(as_json({"error": str(error)}), 400, headers=HEADERS)
            return JSONResponse(as_json(result), headers=HEADERS)

        return endpoint

    questions = questions_of(explorer)

    async def export(request: Request) -> Response:
        kind = request.query_params.get("format", "csv")
        if kind not in ("csv", "json"):
            return JSONResponse({"error": f"format: got {kind!r}; use csv or json"}, 400, headers=HEADERS)
        try:
            found = as_json(await run_in_threadpool(questions["top"], request.query_params))
        except (ValueError, IndexError) as error:
            return JSONResponse(as_json({"error": str(error)}), 400, headers=HEADERS)
        text = json.dumps(found, indent=1) if kind == "json" else as_csv(found)
        name = f"influence-{whole(request.query_params, 'query')}.{kind}"
        headers = {**HEADERS, "Content-Disposition": f'attachment; filename="{name}"'}
        return Response(text, media_type="application/json" if kind == "json" else "text/csv", headers=headers)

    routes = [Route("/", index), Route("/api/export", export)]
    routes += [Route(f"/api/{name}", answers(compute)) for name, compute in questions.items()]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)), Middleware(SameOrigin)]
    app = Starlette(routes=routes, middleware=middleware)
    app.router.redirect_slashes = False  # there is nothing at other addresses, and bytes that are no text break it
    return app


def as_json(value: Any) -> Any:
    """The value as JSON and UTF-8 can hold it: null for numbers that are not finite, � for halves of characters."""
    if isinstance(value, dict):
        return {as_json(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and not value.isascii() else value


def as_csv(found: dict[str, Any]) -> str:
    """The answer of :meth:`Explorer.top` as a table: one line for each example, one column for each step."""
    steps = max((len(e["sdi"]) for side in found.values() for e in side), default=0)
    out = io.StringIO()
    writer = csv.writer(out)
    by_step = [f"step_{t + 1}" for t in range(steps)]
    writer.writerow(["side", "rank", "row", "id", "score", "standard_error", *by_step, "text"])
    for side, examples in found.items():
        for rank, e in enumerate(examples, 1):
            cells = [side, rank, e["row"], e["id"], e["score"], e.get("error"), *e["sdi"], e["text"]]
            writer.writerow([harmless(c) for c in cells])
    return out.getvalue()
