"""A server in a thread, asked over real connections."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import uvicorn
from stepinfluence.app.view.explore import Explorer
from stepinfluence.app.view.explore.server import make_app


@dataclass(frozen=True)
class Served:
    port: int

    def get(self, path: str, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", f"{path}?{urlencode(fields)}" if fields else path, headers=headers or {})
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def json(self, path: str, **fields: Any) -> Any:
        status, _, body = self.get(path, **fields)
        assert status == 200, body
        return json.loads(body)


@contextmanager
def serving(explorer: Explorer) -> Iterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0))
    # wsproto and websockets stay out: the application has none.
    server = uvicorn.Server(uvicorn.Config(make_app(explorer), log_level="warning", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Served(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()
