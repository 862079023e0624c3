"""The server answers its own pages, and nobody else's."""

from __future__ import annotations

import csv
import io
import json

import pytest
from serving import Served
from stepinfluence.app.view.explore import Explorer


def test_page_and_answers(served: Served, explorer: Explorer) -> None:
    status, headers, body = served.get("/")
    assert status == 200
    assert headers["x-content-type-options"] == "nosniff"
    assert b"connect-src 'self'" in body or b"connect-src &#39;self&#39;" in body
    assert served.json("/api/overview") == explorer.overview()
    assert served.json("/api/queries", find="id 3") == explorer.queries(find="id 3")
    assert served.json("/api/example", side="train", row=2) == explorer.example("train", 2)
    assert served.json("/api/curve", query=3) == explorer.curve(3)
    assert served.json("/api/top", query=3, k=4, first=2, last=5) == explorer.top(3, k=4, first=2, last=5)
    assert served.json("/api/pair", query=3, train=5) == explorer.pair(3, 5)
    assert served.json("/api/compare", query=3, other=4) == explorer.compare(3, 4)


@pytest.mark.parametrize(
    ("path", "fields", "says"),
    [
        ("/api/top", {}, "query: got None; give a whole number"),
        ("/api/top", {"query": "x"}, "query: got 'x'"),
        ("/api/top", {"query": 1, "last": 99}, "steps"),
        ("/api/export", {"query": 1, "format": "exe"}, "format"),
        ("/api/export", {"query": 99}, "query: got row 99"),
    ],
)
def test_wrong_requests_are_answered_with_what_is_wrong(
    served: Served, path: str, fields: dict[str, object], says: str
) -> None:
    status, _, body = served.get(path, **fields)
    assert status == 400
    assert says in json.loads(body)["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # a name that was rebound to this machine
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_other_sites_are_refused(served: Served, headers: dict[str, str]) -> None:
    status, _, body = served.get("/api/overview", headers=headers)
    assert status in (400, 403)
    assert b"train" not in body


def test_a_link_from_elsewhere_may_open_the_page(served: Served) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert served.get("/", headers=headers)[0] == 200


@pytest.mark.parametrize("path", ["/manifest.json", "/../../etc/passwd", "/train/manifest.json", "/%2e%2e/train"])
def test_files_are_not_served(served: Served, path: str) -> None:
    assert served.get(path)[0] == 404


def test_export_as_csv_and_json(served: Served, explorer: Explorer) -> None:
    status, headers, body = served.get("/api/export", query=3, k=40)
    assert status == 200
    assert headers["content-disposition"] == 'attachment; filename="influence-3.csv"'
    rows = list(csv.DictReader(io.StringIO(body.decode())))
    found = explorer.top(3, k=40)
    assert len(rows) == len(found["helpful"]) + len(found["harmful"])
    assert float(rows[0]["score"]) == pytest.approx(found["helpful"][0]["score"])
    assert float(rows[0]["step_6"]) == pytest.approx(found["helpful"][0]["sdi"][5])
    assert not any(r["text"].startswith("=") for r in rows)  # no formula for a spreadsheet
    assert any(r["text"].startswith("'=HYPERLINK") for r in rows)
    assert json.loads(served.get("/api/export", query=3, k=40, format="json")[2]) == found
