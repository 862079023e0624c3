"""The HTML report: right numbers, hostile text shown as text, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import multilinear
from packed import unpack
from stepinfluence.app.view.page import embed
from stepinfluence.app.view.report import (
    Accuracy,
    Check,
    QueryItem,
    Report,
    Stage,
    TrainItem,
    View,
    render_report,
)
from stepinfluence.app.view.report.payload import (
    find_peaks,
    pack,
    payload,
)
from stepinfluence.app.view.report.pictures import save_pictures
from stepinfluence.display.words import signed, top_rows, visible

pytest.importorskip("plotly")

STEPS = 12
CHROMIUM = shutil.which("chromium")
HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<b>bold</b> <a href='javascript:alert(1)'>link</a> &amp; ]]> <!--",
    "שלום \u202egnp.exe עולם",
    "nul \x00 bell \x07 line\nbreak\u2028separator",
    "{{ 7 * 7 }} {% raw %} %{x} $\\alpha$ 'quote' \"double\"",
)


@pytest.fixture
def report() -> Report:
    rng = np.random.default_rng(0)
    sdi = rng.normal(size=(80, 3, STEPS)).astype(np.float32)
    sdi[:, 0, 9:] = 0
    train = [TrainItem(str(i), HOSTILE[i % len(HOSTILE)] + str(i), "odd", f"group {i % 4}") for i in range(80)]
    queries = [
        QueryItem(
            id=str(q),
            text=HOSTILE[q],
            loss=0.1 * q,
            truth="odd",
            prediction="odd" if q else "even",
            tokens=tuple(HOSTILE[q].split()),
            group="held out" if q else "",
            read_step=9 if q == 0 else None,
            margin=rng.normal(size=STEPS).astype(np.float32) if q < 2 else None,
        )
        for q in range(3)
    ]
    return Report(
        title="Which <examples>?",
        lede=HOSTILE[0],
        train=train,
        queries=queries,
        sdi=sdi,
        unit="<% of all>",
        note=HOSTILE[1],
        view="both <i>alike</i>",
        others=[View(HOSTILE[1], -2 * sdi, note=HOSTILE[0])],
        checkpoints=["step 1", "<step 2>"],
        energy_by_checkpoint=np.array([[1, 2, 3], [0, 0, 5]], dtype=np.float32),
        checks=[Check("Error <i>", "1e-7", True, "small"), Check("Accuracy", "12 %", False, HOSTILE[1], "≥ 99 %")],
        stages=[Stage("train", 1.5, 1.2, 2**30), Stage("score", 200.0)],
        accuracy=[Accuracy("1", 1.0), Accuracy("2", 0.5, trained=False)],
        accuracy_of="bits",
        method={"Model": HOSTILE[2]},
        command="sdi demo",
    )


def embedded(page: str) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_embedded_numbers_are_those_of_the_arrays(report: Report) -> None:
    data = embedded(render_report(report))
    assert data["steps"] == STEPS
    for column, query in enumerate(data["queries"]):
        for view, shown in zip(query["views"], report.views, strict=True):
            scores = shown.sdi[:, column]
            rows = view["rows"]
            assert np.array_equal(unpack(view["values"]), scores[rows])
            assert np.array_equal(unpack(view["totals"]), scores.sum(1)[rows])
            assert np.array_equal(unpack(view["profile"]), scores.sum(0))
            assert np.array_equal(unpack(view["energy"]), np.abs(scores).sum(0))
            assert view["peaks"] == [int(np.abs(scores[r]).argmax()) + 1 for r in rows]
            assert view["counts"] == [int((scores.sum(1) > 0).sum()), int((scores.sum(1) < 0).sum())]
            by_group = unpack(view["byGroup"])
            assert by_group.shape == (4, STEPS)
            means = multilinear(lambda x: x.mean(0), torch.tensor(scores[1::4]), rows=False)
            means.check(torch.tensor(by_group[1]))
        helpful, harmful = (view["helpful"] for view in query["views"])
        assert query["views"][0]["rows"][:helpful] == query["views"][1]["rows"][harmful:]  # of opposite sign
        assert report.energy_by_checkpoint is not None
        assert np.array_equal(unpack(query["byCheckpoint"]), report.energy_by_checkpoint[:, column])
        margin = report.queries[column].margin
        assert (query["margin"] is None) if margin is None else np.array_equal(unpack(query["margin"]), margin)
    assert [q["readStep"] for q in data["queries"]] == [9, STEPS, STEPS]
    assert not unpack(data["queries"][0]["views"][0]["profile"])[9:].any()
    assert [v["unit"] for v in data["views"]] == ["<% of all>", "first order, weighted by learning rate"]
    assert data["accuracy"] == [
        {"name": "1", "value": 1.0, "trained": True},
        {"name": "2", "value": 0.5, "trained": False},
    ]


def test_strongest_rows_in_order_and_by_sign() -> None:
    totals = np.array([0.5, -2.0, 0.0, 3.0, -1.0, 1.0])
    assert top_rows(totals, 2) == ([3, 5], [1, 4])
    assert top_rows(np.array([1.0, 2.0]), 5) == ([1, 0], [])
    assert top_rows(np.zeros(3), 5) == ([], [])


def test_numbers_for_people() -> None:
    values = (15921.4, -1063.2, 655.0, -0.0349, 1.0, 0.0, 3e-7, -2e8)
    shown = ["+15,921", "-1,063", "+655", "-0.0349", "+1.00", "+0.00e+00", "+3.00e-07", "-2.00e+08"]
    assert [signed(v) for v in values] == shown


def test_hostile_text_is_text(report: Report) -> None:
    page = render_report(report)
    # The only scripts are the data, plotly.js and the page's own; what markup there is comes from the template.
    assert len(re.findall(r"<script\b", page.replace(_plotly(), ""))) == 3
    assert "<img" not in page.replace(_plotly(), "")
    assert 'onerror="document' not in page.replace(_plotly(), "")
    data = embedded(page)
    shown = {item["text"] for item in data["train"].values()}
    assert any(text.startswith(HOSTILE[0]) for text in shown)
    assert not any(c in text for text in shown for c in "\x00\x07\n\u2028\u202e")
    assert any("\\u202egnp.exe" in text for text in shown)
    header = unescape(page[page.index("<header") : page.index("</header>")])
    assert "Which <examples>?" in header
    assert HOSTILE[0] in header


def test_spelled_out_characters() -> None:
    assert visible("a\nb\tc\r") == "a⏎b⇥c"
    assert visible("x\u202ey\u200fz\x00") == "x\\u202ey\\u200fz\\u0000"
    assert visible("é שלום 日本 0101=") == "é שלום 日本 0101="


def test_json_cannot_leave_its_element() -> None:
    text = embed({"a": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028"}
    with pytest.raises(ValueError, match="JSON compliant"):
        embed([float("nan")])


def test_arrays_survive_packing() -> None:
    values = np.array([[0.1, -0.0, 1e-38], [np.float32(np.pi), 3e38, -7]], dtype=np.float32)
    assert np.array_equal(unpack(json.loads(json.dumps(pack(values)))), values)


def test_page_may_load_nothing_and_run_only_its_own_scripts(report: Report) -> None:
    page = render_report(report)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = unescape(policy[1])
    assert "default-src 'none'" in rules
    assert "unsafe-inline" not in rules.partition("script-src")[2]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in rules
    own = page.replace(_plotly(), "")
    assert not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\(""", own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sdi": np.zeros((80, 3), dtype=np.float32)}, "sdi: got shape"),
        ({"sdi": np.zeros((79, 3, STEPS), dtype=np.float32)}, "sdi: got shape"),
        ({"sdi": np.full((80, 3, STEPS), np.nan, dtype=np.float32)}, "NaN"),
        ({"checkpoints": ["one"]}, "energy_by_checkpoint: got shape (2, 3)"),
        ({"first_query": 3}, "first_query: got 3"),
        ({"others": [View("v", np.zeros((80, 3, 1), dtype=np.float32))]}, "others: 'v' has shape (80, 3, 1)"),
        ({"others": [View("v", np.full((80, 3, STEPS), np.inf, dtype=np.float32))]}, "NaN or infinite"),
    ],
)
def test_wrong_reports_are_refused(report: Report, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(report, **change)
    wrong = replace(report.queries[0], read_step=99)
    with pytest.raises(ValueError, match="read_step"):
        replace(report, queries=[wrong, *report.queries[1:]])
    wrong = replace(report.queries[0], margin=np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="margin"):
        replace(report, queries=[wrong, *report.queries[1:]])


def test_smallest_report() -> None:
    """One example, one query, one step, no influence at all: nothing divides by zero."""
    one = Report(
        "t", "l", [TrainItem("a", "")], [QueryItem("q", "", 0.0, "", "")], np.zeros((1, 1, 1), dtype=np.float32)
    )
    query = payload(one)["queries"][0]
    assert query["views"][0]["rows"] == []
    assert query["views"][0]["energyPeaks"] == []
    assert "no period" in query["views"][0]["period"]["says"]
    assert query["dominance"] == ""
    assert "<h1>" in render_report(one)


def test_a_period_is_stated_with_its_p_value_and_only_where_the_test_supports_it(report: Report) -> None:
    steps = np.arange(STEPS * 3)
    regular = np.where(steps % 4 == 3, 1.0, 0.0) * np.ones((80, 3, 1))
    noise = np.random.default_rng(1).normal(size=(80, 3, len(steps)))
    queries = [replace(q, margin=None, read_step=None) for q in report.queries]
    made = replace(
        report, sdi=regular.astype(np.float32), others=[View("noise", noise.astype(np.float32))], queries=queries
    )
    found, none = payload(made)["queries"][0]["views"]
    assert (found["period"]["found"], found["period"]["lag"]) == (True, 4)
    assert found["period"]["says"].startswith("Influence, regardless of sign, repeats every 4 loop steps (auto")
    assert "permutation test p = 0.001" in found["period"]["says"]
    assert found["profilePeriod"]["says"].startswith("Its signed sum repeats every 4 loop steps")
    assert found["energyPeaks"] == list(range(4, len(steps) + 1, 4))
    assert not none["period"]["found"]
    assert none["energyPeaks"] == []  # no bands without a period
    assert re.search(r"shows no period in this run \(permutation test p = 0\.\d\d\)", none["period"]["says"])


def test_a_checkpoint_that_owns_the_sum_is_named(report: Report) -> None:
    names = [q["dominance"] for q in payload(report)["queries"]]
    assert names[0].startswith("Checkpoint step 1 holds 100 %")  # all of (1, 0)
    assert names[2] == ""  # (3, 5)
    assert payload(replace(report, energy_by_checkpoint=None))["queries"][0]["dominance"] == ""


def test_peaks_of_a_profile() -> None:
    assert find_peaks([3, 1, 1, 1, 5, 1, 0, 2, 2, 0, 0, 4]) == [1, 5, 8, 12]
    assert find_peaks(np.arange(6)) == [6]
    assert find_peaks(np.ones(6)) == []
    assert find_peaks(np.zeros(3)) == []
    assert find_peaks([]) == []


def test_pictures(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plain = replace(report, train=[replace(t, text=f"$example_{i}") for i, t in enumerate(report.train)])
    plain = replace(plain, queries=[replace(q, text="0101=") for q in plain.queries])
    for column in (0, 2):
        files = save_pictures(plain, tmp_path, query=column, prefix=f"{column}-")
        assert [f.name for f in files] == [f"{column}-trajectories.png", f"{column}-profile.png"]
        assert all(f.read_bytes().startswith(b"\x89PNG") and f.stat().st_size > 10_000 for f in files)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to open the page in")
def test_opens_in_a_browser(report: Report, tmp_path: Path) -> None:
    """Charts are drawn, the console has no errors, the policy holds, and hostile text does nothing."""
    page = tmp_path / "report.html"
    page.write_text(render_report(report), encoding="utf-8")
    dom = _opened(page.as_uri(), tmp_path)
    assert "<title>Which &lt;examples&gt;?</title>" in dom
    drawn = re.findall(r'<div id="(\w+)" class="chart[^"]*js-plotly-plot', dom)
    assert drawn == ["lines", "profile", "heat", "energy", "checkpoints", "accuracy"]
    assert "<img" not in dom
    assert not re.search(r"<a [^>]*javascript:", dom)
    first = _totals(dom)
    assert _said(dom, "view-note").endswith("Unit: &lt;% of all&gt;.")
    assert _said(dom, "dominance").startswith("Checkpoint step 1 holds 100 % of this query's SDI energy")
    assert "shows no period in this run" in _said(dom, "profile-sub")
    other = _opened(page.as_uri() + "#view=1&query=2", tmp_path)  # minus twice the first view
    assert _said(other, "view-note").endswith("Unit: first order, weighted by learning rate.")
    assert _said(other, "dominance") == ""
    assert first != _totals(other)
    helpful, harmful = (payload(report)["queries"][2]["views"][k] for k in (0, 1))
    assert len(_totals(other)) == 24  # twelve on either side
    assert _totals(other)[0] == pytest.approx(float(unpack(harmful["totals"])[0]), rel=0.01)
    assert _totals(other)[0] == pytest.approx(-2 * float(unpack(helpful["totals"])[helpful["helpful"]]), rel=0.01)


def _said(dom: str, element: str) -> str:
    found = re.search(rf'<p [^>]*id="{element}"[^>]*>(.*?)</p>', dom, re.DOTALL)
    assert found is not None
    return found[1]


def _totals(dom: str) -> list[float]:
    """The third column of the tables of training examples."""
    cells = re.findall(r"</small></td><td>([^<]*)</td>", dom)
    return [float(cell.replace("\u2212", "-").replace(",", "").replace("+", "")) for cell in cells]


def _opened(address: str, folder: Path) -> str:
    """The document after its scripts have run, without plotly.js; the console has to stay empty."""
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--no-first-run", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
         "--virtual-time-budget=5000", "--window-size=1200,900", "--dump-dom", address],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout.replace(_plotly(), "")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
