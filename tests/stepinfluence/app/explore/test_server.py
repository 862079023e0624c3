"""The server answers its own pages, and nobody else's."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import explored
import pytest
import torch
from serving import Served, serving
from stepinfluence.app.view.explore import Explorer, scored
from stepinfluence.app.view.explore.agreement import agreement
from stepinfluence.app.view.explore.everything import overall, reverse
from stepinfluence.app.view.explore.questions import top_with_errors
from stepinfluence.app.view.explore.scored import What
from stepinfluence.app.view.explore.server import make_app
from stepinfluence.attribution.features import Features
from stepinfluence.display.words import harmless
from stepinfluence.store import FailedRow, Manifest, RowInfo, StoredCheckpoint, StoreWriter

from bench.attack.requests import ask


def test_page_and_answers(served: Served, explorer: Explorer) -> None:
    status, headers, body = served.get("/")
    assert status == 200
    assert headers["x-content-type-options"] == "nosniff"
    assert b"connect-src 'self'" in body or b"connect-src &#39;self&#39;" in body
    assert served.json("/api/overview") == explorer.overview()
    assert served.json("/api/queries", find="id 3") == explorer.queries(find="id 3")
    assert served.json("/api/example", side="train", row=2) == explorer.example("train", 2)
    assert served.json("/api/curve", query=3) == explorer.curve(3)
    shown = top_with_errors(explorer, What(3), k=4, first=2, last=5)
    assert served.json("/api/top", query=3, k=4, first=2, last=5) == shown
    without = {side: [{k: v for k, v in e.items() if not k.startswith("error")} for e in shown[side]] for side in shown}
    assert without == explorer.top(3, k=4, first=2, last=5)
    assert served.json("/api/agreement", query=3, checkpoint=1) == agreement(explorer, What(3, checkpoint=1))
    assert served.json("/api/overall", k=3, weights="size") == overall(explorer, k=3, weights="size")
    assert served.json("/api/reverse", train=5, k=3) == reverse(explorer, 5, k=3)
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
        ("/api/top", {"query": 1, "checkpoint": 2}, "checkpoint: got 2; there are 0 to 1"),
        ("/api/overall", {"weights": "any"}, "weights: got 'any'; use alike or size"),
        ("/api/reverse", {"train": 7}, "train 7: has no features"),
        ("/api/exact", {"query": 1}, "model: there is none to recompute with"),
        ("/api/tokens", {"query": 1, "train": 2}, "model: there is none to recompute with"),
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


def test_the_page_is_in_nobodys_frame(served: Served) -> None:
    for path in ("/", "/api/overview"):
        assert served.get(path)[1]["content-security-policy"] == "frame-ancestors 'none'"


BEYOND = ("/api/curve", "/api/top", "/api/pair", "/api/compare", "/api/export")
"""What needs scores that are finite: refused where float32 cannot hold them."""


@pytest.mark.parametrize(("size", "refused"), [(1.0, ()), (1e30, BEYOND)])
def test_scores_and_texts_that_json_cannot_hold(tmp_path: Path, size: float, refused: tuple[str, ...]) -> None:
    """Scores beyond float32, rows that failed, halves of characters in ids, names and texts: no answer is a 500."""
    for split, per_step in (("train", False), ("query", True)):
        stored = (StoredCheckpoint("step \ud800.pt", size, explored.space(0)),)
        manifest = Manifest(stored, 3, per_step=per_step, steps=2 if per_step else None)
        values = torch.full((2, 2, 12) if per_step else (2, 12), size)
        features = Features(
            values=values,
            losses=torch.tensor([1.0, 3e38]),
            steps=torch.full((2,), 2),
            lengths=torch.full((2,), 2) if per_step else None,
            ids=(0, 1),
            space=explored.space(0),
            step_labels=("core \udfff",) * 2,
        )
        rows = [RowInfo(f"\ud83d {row}", "text \udc00", {"half \ud800": "\udfff"}) for row in range(3)]
        writer = StoreWriter.create(tmp_path / split, manifest)
        writer.write_shard(0, 0, features, rows, [FailedRow(2, "NaN")])
    with serving(Explorer.open(tmp_path)) as served:
        assert served.get("/")[0] == 200
        for path, fields in (
            ("/api/overview", {}),
            ("/api/queries", {"find": "text"}),
            ("/api/example", {"side": "train", "row": 1}),
            ("/api/curve", {"query": 0}),
            ("/api/top", {"query": 0}),
            ("/api/pair", {"query": 0, "train": 0}),
            ("/api/pair", {"query": 1, "train": 2}),
            ("/api/compare", {"query": 0, "other": 1}),
            ("/api/export", {"query": 0}),
            ("/api/export", {"query": 0, "format": "json"}),
        ):
            status, _, body = served.get(path, **fields)
            assert status == (400 if path in refused else 200), (path, fields, body)
            assert b"Infinity" not in body
            assert b"NaN" not in body.replace(b'"failed": "NaN"', b"").replace(b'"failed":"NaN"', b"")
        for fields in ({"query": "\u0661" * 5000}, {"query": 10**30}, {"query": 0, "parameters": "*" * 10_000}):
            assert served.get("/api/curve", **fields)[0] == 400


@pytest.mark.parametrize(
    ("cell", "made"),
    [
        ("=1+1", "'=1+1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ("\uff0b1", "'\uff0b1"),
        ("\uff0d1", "'\uff0d1"),
        ("\uff20SUM(1)", "'\uff20SUM(1)"),
        (" =1", "' =1"),
        ("\t=1", "'\t=1"),
        ("\r1", "'\r1"),
        ("-1", "'-1"),
        ("plain", "plain"),
        ("", ""),
        (-1.5, -1.5),
    ],
)
def test_cells_that_a_spreadsheet_would_calculate(cell: object, made: object) -> None:
    assert harmless(cell) == made


def test_what_is_kept_does_not_grow_without_bound(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored, "MOST_KEPT", 3)
    for k in range(8):
        explorer.curve(3, parameters="core" + "*" * (k + 1))
    assert len(explorer.scored._scores) == len(explorer.scored._small) == 3


def test_export_as_csv_and_json(served: Served, explorer: Explorer) -> None:
    status, headers, body = served.get("/api/export", query=3, k=40)
    assert status == 200
    assert headers["content-disposition"] == 'attachment; filename="influence-3.csv"'
    rows = list(csv.DictReader(io.StringIO(body.decode())))
    found = top_with_errors(explorer, What(3), k=40)
    assert len(rows) == len(found["helpful"]) + len(found["harmful"])
    assert float(rows[0]["score"]) == pytest.approx(found["helpful"][0]["score"])
    assert float(rows[0]["standard_error"]) == pytest.approx(found["helpful"][0]["error"])
    assert float(rows[0]["step_6"]) == pytest.approx(found["helpful"][0]["sdi"][5])
    assert not any(r["text"].startswith("=") for r in rows)  # no formula for a spreadsheet
    assert any(r["text"].startswith("'=HYPERLINK") for r in rows)
    assert json.loads(served.get("/api/export", query=3, k=40, format="json")[2]) == found


@pytest.mark.parametrize("query", [b"x=\xb2", b"\xff\xfe", b"query=1&first=\xc3("])
@pytest.mark.parametrize("path", ["/api/export/", "/api/top/", "/nothing"])
def test_addresses_that_are_no_text(explorer: Explorer, path: str, query: bytes) -> None:
    """A slash at the end once led to a redirect, whose address could not be written."""
    status, body = ask(make_app(explorer), ("GET", path, query, [("host", "127.0.0.1")], b""))
    assert (status, body) == (404, b"Not Found")
