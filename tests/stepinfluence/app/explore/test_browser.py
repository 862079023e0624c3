"""The page in a real Chromium: click paths, hostile text, no errors in the console. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import errors, needs_browser, open_page, rows, set_value, settled, webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from serving import Served, serving
from stepinfluence.app.view.explore import Explorer, write_page

pytestmark = needs_browser


def test_a_walk_through_the_explorer(browser: webdriver.Chrome, served: Served, explorer: Explorer) -> None:
    open_page(browser, f"http://127.0.0.1:{served.port}/")
    assert rows(browser, "helpful") == [e["row"] for e in explorer.top(0)["helpful"]]

    set_value(browser, "first", "5")  # who matters in steps 5 and 6
    wanted = [e["row"] for e in explorer.top(0, first=5)["helpful"]]
    WebDriverWait(browser, 20).until(lambda b: rows(b, "helpful") == wanted)
    set_value(browser, "parameters", "core.b")
    wanted = [e["row"] for e in explorer.top(0, first=5, parameters="core.b")["helpful"]]
    WebDriverWait(browser, 20).until(lambda b: rows(b, "helpful") == wanted)
    set_value(browser, "parameters", "")
    set_value(browser, "first", "1")
    wanted = [e["row"] for e in explorer.top(0)["harmful"]]
    WebDriverWait(browser, 20).until(lambda b: rows(b, "harmful") == wanted)

    assert not errors(browser)
    browser.find_element(By.CSS_SELECTOR, "#harmful tr[data-row]").send_keys(Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda b: b.find_element(By.ID, "pair").is_displayed())
    assert browser.find_element(By.CSS_SELECTOR, "#matrix .main-svg").is_displayed()
    assert browser.find_element(By.CSS_SELECTOR, "#pair-groups .main-svg").is_displayed()

    set_value(browser, "other", "4")
    WebDriverWait(browser, 20).until(lambda b: "Correlation" in b.find_element(By.ID, "compare-sub").text)

    browser.find_element(By.TAG_NAME, "body").send_keys("j")
    WebDriverWait(browser, 20).until(lambda b: rows(b, "helpful") == [e["row"] for e in explorer.top(1)["helpful"]])
    assert browser.execute_script("return location.hash") == "#q1"

    set_value(browser, "find", "id 3")
    WebDriverWait(browser, 20).until(lambda b: b.find_element(By.ID, "found").text.startswith("1 found"))
    assert errors(browser) == []


def test_wrong_filters_are_said_and_nothing_is_lost(browser: webdriver.Chrome, served: Served) -> None:
    open_page(browser, f"http://127.0.0.1:{served.port}/")
    before = rows(browser, "helpful")
    set_value(browser, "last", "99")
    WebDriverWait(browser, 20).until(
        lambda b: "steps: give two numbers from 1 to 6" in b.find_element(By.ID, "refused").text
    )
    assert rows(browser, "helpful") == before
    set_value(browser, "last", "6")
    WebDriverWait(browser, 20).until(lambda b: not b.find_element(By.ID, "refused").is_displayed())
    assert errors(browser) == []


@pytest.mark.parametrize("saved", [False, True], ids=["server", "file"])
def test_hostile_text_is_text(
    browser: webdriver.Chrome, served: Served, explorer: Explorer, tmp_path: Path, saved: bool
) -> None:
    address = f"http://127.0.0.1:{served.port}/"
    if saved:
        write_page(explorer, tmp_path / "page.html", queries=5)
        address = (tmp_path / "page.html").as_uri()
    for query in (1, 3):  # markup, and a megabyte
        browser.get("about:blank")
        browser.get(f"{address}#q{query}")
        settled(browser)
        for row in browser.find_elements(By.CSS_SELECTOR, ".ranked tr[data-row]")[:3]:
            browser.execute_script("arguments[0].click()", row)
        WebDriverWait(browser, 20).until(lambda b: b.find_element(By.ID, "pair").is_displayed())
        assert browser.title.startswith("my <run>")
        assert (
            browser.find_elements(By.CSS_SELECTOR, "#main img, #main script, #main b, #queries script, #queries img")
            == []
        )
    assert errors(browser) == []


def test_the_file_needs_no_server(browser: webdriver.Chrome, explorer: Explorer, tmp_path: Path) -> None:
    write_page(explorer, tmp_path / "page.html", queries=3)
    open_page(browser, (tmp_path / "page.html").as_uri())
    assert rows(browser, "helpful") == [e["row"] for e in explorer.top(0)["helpful"]]
    assert browser.find_element(By.ID, "found").text == "3 (of 9 in the run)"
    set_value(browser, "first", "6")
    best = explorer.top(0, first=6, k=1)["helpful"][0]["row"]  # kept because it leads at that step
    WebDriverWait(browser, 20).until(lambda b: rows(b, "helpful")[0] == best)
    assert errors(browser) == []


def test_both_scores_can_be_looked_at(browser: webdriver.Chrome, corrected: Explorer, tmp_path: Path) -> None:
    write_page(corrected, tmp_path / "page.html", queries=2, progress=False)
    with serving(corrected) as served:
        for address in (f"http://127.0.0.1:{served.port}/", (tmp_path / "page.html").as_uri()):
            open_page(browser, address)
            assert rows(browser, "helpful") == [e["row"] for e in corrected.top(0)["helpful"]]
            assert "Scores: corrected for curvature" in browser.find_element(By.ID, "curve-sub").text
            set_value(browser, "score", "sdi")
            wanted = [e["row"] for e in corrected.top(0, score="sdi")["helpful"]]
            WebDriverWait(browser, 20).until(lambda b, wanted=wanted: rows(b, "helpful") == wanted)
            assert "Scores: SDI" in browser.find_element(By.ID, "curve-sub").text
            assert not errors(browser)
