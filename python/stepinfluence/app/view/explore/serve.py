"""Running the explorer's application until it is interrupted."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import uvicorn

from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.server import make_app

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    explorer: Explorer, *, host: str = "127.0.0.1", port: int = 0, ready: Callable[[str], None] = lambda _: None
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        explorer: what to show.
        host: address to listen on.
        port: 0 for any free one.
        ready: called with the address of the page once connections are accepted.

    Raises:
        ValueError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        # Numbers below zero are of names that stand for no address.
        wrong = "host" if (error.errno or -1) < 0 or error.errno == errno.EADDRNOTAVAIL else "port"
        reason = str(error.strerror).partition(" (while")[0]
        raise ValueError(f"{wrong}: cannot listen on {host}:{port} ({reason}); choose another --{wrong}") from error
    with listener:
        shown = f"[{host}]" if ":" in host else host
        names = (host, shown, *LOOPBACK, "[::1]") if host in LOOPBACK else (host, shown)
        app = make_app(explorer, hosts=names)
        ready(f"http://{shown}:{listener.getsockname()[1]}/")
        # The socket already queues connections: a browser that is quicker than the server waits.
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        server.run(sockets=[listener])
