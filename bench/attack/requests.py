"""Requests to the explorer, well formed and not: an answer, or an error that says what is wrong."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import threading
from pathlib import Path
from random import Random
from typing import Any, TypeAlias
from urllib.parse import quote, urlencode

from bench.attack.campaign import Attack, Campaign
from bench.attack.made import write_store
from bench.attack.mutate import ODD, damaged
from bench.attack.verdicts import LOST, REFUSED, SAME, SILENT, UNCAUGHT, Verdict

Fields: TypeAlias = dict[str, str]
Answer: TypeAlias = tuple[int, bytes]

ASKED: tuple[tuple[str, Fields], ...] = (
    ("/", {}),
    ("/api/overview", {}),
    ("/api/queries", {"find": "example", "offset": "0", "limit": "3"}),
    ("/api/example", {"side": "train", "row": "1"}),
    ("/api/curve", {"query": "1", "parameters": "w"}),
    ("/api/top", {"query": "1", "k": "3", "first": "1", "last": "2"}),
    ("/api/pair", {"query": "1", "train": "2"}),
    ("/api/compare", {"query": "1", "other": "2"}),
    ("/api/export", {"query": "1", "format": "csv", "k": "2"}),
    ("/api/export", {"query": "2", "format": "json"}),
)
PATHS = (
    "/api/",
    "/api/top/../../etc/passwd",
    "//",
    "/%00",
    "/%2e%2e/config.yaml",
    "/static/x",
    "/api/export/",
    "*",
    "/é",
    "\\",
)
HEADERS: tuple[tuple[str, str], ...] = (
    ("host", "evil.example"),
    ("host", ""),
    ("host", "127.0.0.1:99999"),
    ("origin", "http://evil.example"),
    ("origin", "null"),
    ("sec-fetch-site", "cross-site"),
    ("sec-fetch-mode", "navigate"),
    ("x-forwarded-host", "evil.example"),
    ("content-length", "-1"),
    ("content-type", "multipart/form-data; boundary="),
    ("cookie", "a=" + "b" * 4000),
    ("range", "bytes=0-,0-,0-"),
    ("accept-encoding", "\xff"),
    ("if-modified-since", "never"),
)
SECRET = b"what no page shows"
FINE = (200, 400, 403, 404, 405)


def odd_text(rng: Random) -> str:
    try:
        return str(rng.choice(ODD)(rng))[:3000]
    except RecursionError:
        return "[" * 3000


def odd_request(rng: Random) -> tuple[str, str, bytes, list[tuple[str, str]], bytes]:
    """Method, path, query string, headers and body."""
    path, fields = rng.choice(ASKED)
    fields = dict(fields)
    headers, method, body = [("host", "127.0.0.1")], "GET", b""
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice([*fields, "k", "score", "parameters", "first", "last", "x"])
        if rng.random() < 0.2:
            fields.pop(name, None)
        else:
            fields[name] = odd_text(rng)
    if rng.random() < 0.15:
        path = rng.choice((*PATHS, "/" + odd_text(rng)[:200]))
    if rng.random() < 0.25:
        name, value = rng.choice(HEADERS)
        headers = [h for h in headers if h[0] != name] + [(name, value)]
    if rng.random() < 0.15:
        method, body = (
            rng.choice(("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "X" * 300, "get")),
            rng.randbytes(40),
        )
    query = urlencode(fields, errors="surrogatepass").encode()
    if rng.random() < 0.2:
        query = damaged(rng, query)
    return method, path, query, headers, body


def ask(app: Any, request: tuple[str, str, bytes, list[tuple[str, str]], bytes]) -> Answer:
    """The application's answer, without a socket between."""
    method, path, query, headers, body = request
    found: dict[str, Any] = {"status": 0, "body": b""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found["status"] = message["status"]
        else:
            found["body"] += message.get("body", b"")

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode("utf-8", "replace"), "query_string": query, "root_path": "",
        "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return found["status"], found["body"]


def odd_bytes(rng: Random, port: int) -> bytes:
    """A request as it goes over the wire, damaged."""
    path, fields = rng.choice(ASKED)
    target = path + ("?" + urlencode(fields) if fields else "")
    if rng.random() < 0.3:
        target = quote(odd_text(rng), safe="/?&=%", errors="surrogatepass")
    head = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    if rng.random() < 0.3:
        head += rng.choice(
            (
                "Content-Length: 99999999999999999999\r\n",
                "Transfer-Encoding: chunked\r\n",
                "X: " + "y" * 70_000 + "\r\n",
            )
        )
    data = (head + "\r\n").encode()
    return damaged(rng, data, b"\r\n\r\n\0\xff: chunked zz\r\n") if rng.random() < 0.8 else data


def serve(app: Any) -> tuple[int, list[str]]:
    """Put the application behind a real server, for as long as this process lives; its port, and the errors that it
    has logged."""
    import uvicorn

    errors: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                errors.append(self.format(record).splitlines()[-1])

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off", timeout_keep_alive=1))
    logging.getLogger("uvicorn.error").addHandler(Kept())
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    return listener.getsockname()[1], errors


def over_the_wire(rng: Random, port: int) -> Answer:
    """Status and bytes of the server's answer to a damaged request; 0 where it hung up, or waits for more."""
    data = odd_bytes(rng, port)
    with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
        reply = b""
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                reply += chunk
        except OSError:  # hung up, or waiting for the rest of a request
            pass
    first = reply.split(b"\r\n", 1)[0].split(b" ")
    return (int(first[1]) if len(first) > 1 and first[1].isdigit() else 0), reply


def prepare(folder: Path) -> Attack:
    from stepinfluence.app.view.explore import Explorer
    from stepinfluence.app.view.explore.server import make_app

    write_store(folder / "run" / "train")
    write_store(folder / "run" / "test", per_step=True)
    (folder / "run" / "config.yaml").write_bytes(SECRET)
    app = make_app(Explorer.open(folder / "run"))
    wanted = {}
    for path, fields in ASKED:
        wanted[path, urlencode(fields)] = ask(
            app, ("GET", path, urlencode(fields).encode(), [("host", "127.0.0.1")], b"")
        )
        if wanted[path, urlencode(fields)][0] != 200:
            raise RuntimeError(f"{path}: {wanted[path, urlencode(fields)]}")
    port, errors = serve(app)

    def judge(where: str, status: int, body: bytes) -> Verdict:
        if errors:
            return Verdict(UNCAUGHT, f"{where}: {errors.pop()}")
        if status not in FINE:
            return Verdict(UNCAUGHT, f"{where}: status {status}: {body[:200]!r}")
        if SECRET in body or b"root:x:" in body:
            return Verdict(LOST, f"{where}: a file was served")
        return Verdict(SAME if status == 200 else REFUSED, f"{where}: status {status}")

    def wire(rng: Random) -> Verdict:
        status, body = over_the_wire(rng, port)
        found = judge("wire", status or 400, body)
        if not found.bad and rng.random() < 0.1:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/api/overview", headers={"Host": f"127.0.0.1:{port}"})
            reply = connection.getresponse()
            if (reply.status, reply.read()) != wanted["/api/overview", ""]:
                return Verdict(SILENT, "wire: another answer afterwards")
            connection.close()
        return found

    def attack(rng: Random) -> Verdict:
        if rng.random() < 0.03:
            return wire(rng)
        request = odd_request(rng)
        method, path, query, headers, _ = request
        where = f"{method[:10]} {path[:60]!r} {query[:80]!r} {[h for h in headers if h[0] != 'host']!r:.80}"
        try:
            status, body = ask(app, request)
        except Exception as error:  # the server would answer 500
            return Verdict(UNCAUGHT, f"{where}: {type(error).__name__}: {error}")
        found = judge(where, status, body)
        known = wanted.get((path, query.decode("latin-1")))
        if known is not None and status == 200 and method == "GET" and (status, body) != known:
            return Verdict(SILENT, f"{where}: another answer")
        if status == 400 and path != "/" and method == "GET" and b'"error"' in body:
            message = json.loads(body)["error"]
            if "\n" in message or not message:
                return Verdict(UNCAUGHT, f"{where}: {message!r}")
        return found

    return attack


CAMPAIGN = Campaign("requests", "requests to the explorer", 0.06, prepare)
