"""What can be looked at beside one query's list, in a real Chromium: checkpoints, answers, tokens, all queries, exact
influence, and the address that leads back to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import (
    WebDriverWait,
    click,
    errors,
    needs_browser,
    open_page,
    resize,
    rows,
    set_value,
    settled,
    text,
    texts,
    until,
    webdriver,
)
from explored import write_split
from serving import Served, serving
from stepinfluence.app.view.explore import Explorer, write_page
from stepinfluence.app.view.explore.everything import overall, reverse
from stepinfluence.app.view.explore.model import exact, tokens

pytestmark = needs_browser
READ = "return document.querySelector(arguments[0])?.innerText.includes(arguments[1])"


@pytest.fixture(scope="module")
def served_words(told: Explorer) -> Iterator[Served]:
    with serving(told) as served:
        yield served


@pytest.fixture(scope="module")
def file_of_words(told: Explorer, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("file") / "words.html"
    write_page(told, path, queries=4, exactly=True, by_token=True, progress=False)
    return path.as_uri()


@pytest.fixture(params=["server", "file"])
def address(request: pytest.FixtureRequest, browser: webdriver.Chrome) -> str:
    """The run of words, behind a server or as a file."""
    resize(browser, 1280)
    if request.param == "file":
        return str(request.getfixturevalue("file_of_words"))
    return f"http://127.0.0.1:{request.getfixturevalue('served_words').port}/"


def test_the_address_leads_back(browser: webdriver.Chrome, served_words: Served, told: Explorer) -> None:
    """Reload and the back button keep what is looked at."""
    resize(browser, 1280)
    open_page(browser, f"http://127.0.0.1:{served_words.port}/")
    for element, value in (("first", "2"), ("checkpoint", "1"), ("k", "3"), ("parameters", "core.0.bias")):
        set_value(browser, element, value)
    wanted = told.top(0, k=3, first=2, checkpoint=1, parameters="core.0.bias")
    until(browser, "return document.querySelectorAll('#helpful tr[data-row]').length <= 3")
    settled(browser)
    click(browser, "#helpful tr[data-row]")
    until(browser, "return !document.getElementById('pair').hidden")
    set_value(browser, "other", "2")
    until(browser, READ, "#compare-sub", "Correlation")
    kept = browser.execute_script("return location.hash")
    row = wanted["helpful"][0]["row"]
    assert kept == f"#q0&checkpoint=1&parameters=core.0.bias&steps=2-3&k=3&row={row}&with=2"

    browser.refresh()
    settled(browser)
    until(browser, READ, "#compare-sub", "Correlation")
    until(browser, "return !document.getElementById('pair').hidden")
    assert browser.execute_script("return location.hash") == kept
    assert rows(browser, "helpful") == [e["row"] for e in wanted["helpful"]]
    assert text(browser, "#pair-meta dd") == told.example("train", row)["id"]

    browser.back()  # to no comparison
    until(browser, "return !location.hash.includes('with')")
    browser.back()  # to no example
    until(browser, "return document.getElementById('pair').hidden")
    browser.back()  # to all parameters
    until(browser, "return !location.hash.includes('parameters')")
    wanted = told.top(0, k=3, first=2, checkpoint=1)
    until(
        browser,
        "return document.querySelector('#helpful tr[data-row]').dataset.row === arguments[0]",
        str(wanted["helpful"][0]["row"]),
    )
    browser.forward()
    until(browser, "return location.hash.includes('parameters=core.0.bias')")
    assert errors(browser) == []


def test_an_address_that_says_nonsense_gets_the_defaults(
    browser: webdriver.Chrome, address: str, told: Explorer
) -> None:
    open_page(browser, f"{address}#q99&steps=7-9&score=none&checkpoint=5&k=0&row=500&with=x")
    assert rows(browser, "helpful") == [e["row"] for e in told.top(0)["helpful"]]
    assert browser.execute_script("return location.hash") == "#q0"
    assert errors(browser) == []


def test_steps_outside_the_range_are_refused_where_they_stand(browser: webdriver.Chrome, address: str) -> None:
    open_page(browser, address)
    before, hash_ = rows(browser, "helpful"), browser.execute_script("return location.hash")
    for element, value, wrong in (
        ("last", "4", "last"),
        ("first", "-1", "first"),
        ("first", "2.5", "first"),
        ("k", "0", "k"),
    ):
        set_value(browser, element, value)
        until(browser, "return document.getElementById(arguments[0]).getAttribute('aria-invalid') === 'true'", wrong)
        assert text(browser, "#refused").startswith(
            ("steps: give two numbers from 1 to 3", "rows: give a number from 1")
        )
        assert rows(browser, "helpful") == before
        assert browser.execute_script("return location.hash") == hash_
        set_value(browser, element, {"last": "3", "first": "1", "k": "10"}[element])
        until(browser, "return document.getElementById('refused').hidden")
    assert browser.execute_script("return document.getElementById('notice').hidden")
    assert errors(browser) == []


def test_a_checkpoint_can_be_looked_at_alone(browser: webdriver.Chrome, address: str, told: Explorer) -> None:
    open_page(browser, address)
    shares = told.curve(0)["shares"]
    assert [t.replace("\n", " ").split(" ")[0] for t in texts(browser, "#shares .share")] == ["step-1.pt", "step-2.pt"]
    assert [t.split()[-2] for t in texts(browser, "#shares .share")] == [f"{100 * s:.1f}" for s in shares]
    click(browser, "#shares .share:nth-child(2)")
    until(browser, READ, "#curve-sub", "at checkpoint step-2.pt alone")
    settled(browser)
    wanted = told.top(0, checkpoint=1)
    assert rows(browser, "helpful") == [e["row"] for e in wanted["helpful"]]
    assert rows(browser, "harmful") == [e["row"] for e in wanted["harmful"]]
    click(browser, "#shares .share:nth-child(2)")  # once more: all of them again
    until(browser, "return !document.getElementById('curve-sub').innerText.includes('alone')")
    settled(browser)
    assert rows(browser, "helpful") == [e["row"] for e in told.top(0)["helpful"]]
    assert errors(browser) == []


def test_the_answer_stands_beside_the_truth(browser: webdriver.Chrome, address: str, told: Explorer) -> None:
    verdicts = set()
    for query in range(4):
        open_page(browser, f"{address}#q{query}")
        want = told.example("query", query)
        mark = "✓ right" if want["right"] else "✗ wrong"
        assert text(browser, "#verdict") == f"The model answers {want['answer']}; the truth is {want['truth']} {mark}"
        assert texts(browser, "#tokens bdi") == want["tokens"]
        assert text(browser, f"#item{query} .who span").startswith(mark[0])
        verdicts.add(want["right"])
    assert verdicts, "no query"
    assert errors(browser) == []


def test_scores_have_standard_errors_and_the_ranking_a_verdict(
    browser: webdriver.Chrome, address: str, told: Explorer
) -> None:
    from stepinfluence.app.view.explore.agreement import agreement
    from stepinfluence.app.view.explore.questions import top_with_errors
    from stepinfluence.app.view.explore.scored import What

    open_page(browser, address)
    until(browser, READ, "#trust", "lead by the one")
    found, want = texts(browser, "#helpful td.score"), top_with_errors(told, What(0))["helpful"]
    for shown, entry in zip(found, want, strict=True):
        score, error = shown.replace("−", "-").split(" ± ")
        assert float(score) == pytest.approx(entry["score"], rel=0.01)
        assert float(error) == pytest.approx(entry["error"], rel=0.06)
    told_ = agreement(told, What(0))
    counts = [told_["sides"][side] for side in ("helpful", "harmful")]
    lines = [
        f"{c['halves'][0]} and {c['halves'][1]} of the {c['rows']} {s}"
        for c, s in zip(counts, ("helpful", "harmful"), strict=True)
    ]
    assert ", ".join(lines) in text(browser, "#trust")
    assert errors(browser) == []


def test_shown_rows_are_recomputed_exactly(browser: webdriver.Chrome, address: str, told: Explorer) -> None:
    open_page(browser, address)
    until(browser, "return !document.getElementById('exact').hidden")
    click(browser, "#exact")
    until(browser, READ, "#exact-note", "Recomputed without sketches")
    want = exact(told, 0)
    for side in ("helpful", "harmful"):
        for row, shown in zip(rows(browser, side), texts(browser, f"#{side} td.exact"), strict=True):
            assert float(shown.replace("−", "-")) == pytest.approx(want["rows"][str(row)]["score"], rel=0.01)
    remain = want["remain"]["helpful"]
    assert f"{remain} of the {len(rows(browser, 'helpful'))} helpful" in text(browser, "#exact-note")
    assert errors(browser) == []


def test_influence_by_token_and_step(browser: webdriver.Chrome, address: str, told: Explorer) -> None:
    open_page(browser, address)
    row = rows(browser, "helpful")[0]
    click(browser, "#helpful tr[data-row]")
    until(browser, "return !document.getElementById('pair').hidden")
    assert texts(browser, "#pair-tokens bdi") == told.example("train", row)["tokens"]
    click(browser, "#by-token-button")
    until(browser, "return document.querySelectorAll('#token-boxes bdi').length > 0")
    want = tokens(told, 0, row)
    assert texts(browser, "#token-boxes bdi") == want["tokens"]
    totals = [sum(path) for path in want["sdi"]]
    titles = browser.execute_script("return [...document.querySelectorAll('#token-boxes bdi')].map((e) => e.title)")
    for title, total in zip(titles, totals, strict=True):
        assert float(title.replace("−", "-")) == pytest.approx(total, rel=0.01, abs=1e-9)
    assert sum(totals) == pytest.approx(sum(told.pair(0, row)["sdi"]), rel=0.01)
    drawn = browser.execute_script("return document.getElementById('token-heat').data[0].z.length")
    assert drawn == len(want["tokens"])
    colours = browser.execute_script(
        "return [...document.querySelectorAll('#token-boxes bdi')].map((e) => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(colours)) > 1, "all boxes have one colour"
    assert "&tokens=1" in browser.execute_script("return location.hash")
    assert errors(browser) == []


def test_all_queries_together_and_the_reverse(browser: webdriver.Chrome, address: str, told: Explorer) -> None:
    open_page(browser, address)
    click(browser, "[data-tab=all]")
    until(browser, "return document.querySelectorAll('#all-helpful tr[data-row]').length > 0")
    settled(browser)
    assert rows(browser, "all-helpful") == [e["row"] for e in overall(told)["helpful"]]
    set_value(browser, "weights", "size")
    wanted = [e["row"] for e in overall(told, weights="size")["harmful"]]
    WebDriverWait(browser, 20).until(lambda b: rows(b, "all-harmful") == wanted)
    row = rows(browser, "all-helpful")[0]
    click(browser, "#all-helpful tr[data-row]")
    until(browser, "return !document.getElementById('reverse').hidden")
    found = reverse(told, row)
    helped = [e["row"] for e in found["helpful"]]
    if address.startswith("file"):  # which holds four queries, and lists the first five of all
        helped = [r for r in helped[:5] if r < 4]
    assert rows(browser, "helped") == helped
    assert f"helps {found['helps']} and harms {found['harms']}" in text(browser, "#reverse-sub")
    click(browser, "#helped tr[data-row]")  # and on to that query
    until(browser, "return location.hash.startsWith(arguments[0])", f"#q{helped[0]}")
    settled(browser)
    assert rows(browser, "helpful") == [e["row"] for e in told.top(helped[0])["helpful"]]
    assert errors(browser) == []


def test_charts_name_their_rows_and_colours(browser: webdriver.Chrome, address: str, told: Explorer) -> None:
    open_page(browser, address)
    labels = browser.execute_script("return document.getElementById('heat').layout.yaxis.ticktext")
    first = told.top(0)["helpful"][0]
    assert labels[0].startswith(f"\u2068{first['id']}: {first['text'].split()[0]}")
    assert texts(browser, "section:not([hidden]) > .legend .key") == ["helps", "harms", "energy"]
    assert browser.title.startswith("run · query-0 · ")  # the run's name, and what is looked at
    assert text(browser, "h1") == "run"


def test_what_the_model_must_not_be_run_for_is_said(browser: webdriver.Chrome, words: Path) -> None:
    resize(browser, 1280)
    untrusted = Explorer.open(
        words, no_model="this run was not written here by you: start sdi explore with --trust-project"
    )
    with serving(untrusted) as served:
        open_page(browser, f"http://127.0.0.1:{served.port}/#q1&row=2&tokens=1")
        until(browser, READ, "#exact-note", "not written here by you")
        until(browser, READ, "#by-token-note", "not written here by you")
        for element in ("exact", "by-token-button"):
            assert browser.execute_script("return document.getElementById(arguments[0]).hidden", element)
        assert errors(browser) == []
        assert served.get("/api/exact", query=1)[0] == served.get("/api/tokens", query=1, train=2)[0] == 400


def test_a_long_list_has_only_the_lines_in_sight(browser: webdriver.Chrome, tmp_path: Path) -> None:
    resize(browser, 1280)
    write_split(tmp_path / "train", 8, per_step=False, seed=1)
    write_split(tmp_path / "test", 3000, per_step=True, seed=2, texts=("seven", "eight", "nine"), shard_rows=1024)
    with serving(Explorer.open(tmp_path)) as served:
        open_page(browser, f"http://127.0.0.1:{served.port}/#q2500")
        until(browser, "return document.getElementById('item2500')?.getAttribute('aria-selected') === 'true'")
        assert browser.execute_script("return document.querySelectorAll('#queries li').length") < 60
        assert text(browser, "#found") == "3,000"
        browser.execute_script("const q = document.getElementById('queries'); q.scrollTop = q.scrollHeight")
        until(browser, "return document.getElementById('item2999') !== null")
        assert browser.execute_script("return document.querySelectorAll('#queries li').length") < 60
        set_value(browser, "find", "id 299")
        until(browser, READ, "#found", "11 found")
        until(browser, "return document.querySelectorAll('#queries li').length === 11")
        click(browser, "#item2991")
        until(browser, "return location.hash === '#q2991'")
        assert errors(browser) == []


def test_a_list_taller_than_browsers_allow_can_be_scrolled(browser: webdriver.Chrome, served: Served) -> None:
    """Places are squeezed: a million lines of 52 pixels would be cut off."""
    resize(browser, 1280)
    open_page(browser, f"http://127.0.0.1:{served.port}/")
    made = """
      const items = (offset, limit) => Array.from({ length: limit }, (_, k) => ({ row: offset + k }));
      const fetched = async (offset, limit) => ({ total: 1e6, items: items(offset, limit) });
      window.big = new VirtualList(document.getElementById('queries'), fetched,
        (q) => element('li', { id: `big${q.row}` }, String(q.row)), () => {});
      return big.reset();
    """
    browser.execute_script(made)
    until(browser, "return document.getElementById('big0') !== null")
    for place in (499_999, 999_999, 3):
        browser.execute_script("big.reveal(arguments[0])", place)
        until(browser, "big.draw(); return document.getElementById(`big${arguments[0]}`) !== null", place)
        inside = """
          const box = document.getElementById('queries').getBoundingClientRect();
          const line = document.getElementById(`big${arguments[0]}`).getBoundingClientRect();
          return line.top >= box.top - 1 && line.bottom <= box.bottom + 1;
        """
        assert browser.execute_script(inside, place), place
    assert errors(browser) == []
