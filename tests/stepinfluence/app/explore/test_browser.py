"""The page in a real Chromium: click paths, hostile text, no errors in the console. Skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served, serving
from stepinfluence.app.view.explore import Explorer, write_page

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's own pipe to the driver
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,1400",
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path_factory.mktemp("downloads"))})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def open_page(browser: webdriver.Chrome, address: str) -> None:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(address)
    settled(browser)


def settled(browser: webdriver.Chrome) -> None:
    WebDriverWait(browser, 30).until(
        lambda b: b.execute_script(
            "return document.querySelectorAll('#helpful tbody tr').length > 0 && "
            "!document.querySelector('#main').classList.contains('busy')"
        )
    )


def errors(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def rows(browser: webdriver.Chrome, table: str) -> list[int]:
    # In one go: the page may draw the table anew between two questions.
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => Number(e.dataset.row))"
    return list(browser.execute_script(script, f"#{table} tr[data-row]"))


def set_value(browser: webdriver.Chrome, element: str, value: str) -> None:
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event('change')); e.dispatchEvent(new Event('input'));",
        element,
        value,
    )


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
    WebDriverWait(browser, 20).until(lambda b: b.find_element(By.ID, "found").text.startswith("1 of 1"))
    assert errors(browser) == []


def test_wrong_filters_are_said_and_nothing_is_lost(browser: webdriver.Chrome, served: Served) -> None:
    open_page(browser, f"http://127.0.0.1:{served.port}/")
    before = rows(browser, "helpful")
    set_value(browser, "last", "99")
    WebDriverWait(browser, 20).until(
        lambda b: "steps: give two numbers from 1 to 6" in b.find_element(By.ID, "notice").text
    )
    assert rows(browser, "helpful") == before
    set_value(browser, "last", "6")
    WebDriverWait(browser, 20).until(lambda b: not b.find_element(By.ID, "notice").is_displayed())
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
    assert browser.find_element(By.ID, "found").text == "3 of 3 (of 9 in the run)"
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
