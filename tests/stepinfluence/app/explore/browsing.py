"""A real Chromium, and what tests ask of a page in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

needs_browser = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's own pipe to the driver
]


def start(downloads: Path, *, width: int = 1280, height: int = 1400) -> webdriver.Chrome:
    """A browser whose page is that large."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def resize(browser: webdriver.Chrome, width: int, scheme: str = "light") -> None:
    """Make the page that wide, on a device that prefers a colour scheme."""
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


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


def until(browser: webdriver.Chrome, script: str, *arguments: object) -> object:
    """Wait until a piece of JavaScript gives something true, and return that."""
    return WebDriverWait(browser, 30).until(lambda b: b.execute_script(script, *arguments))


def click(browser: webdriver.Chrome, selector: str) -> None:
    until(browser, "return document.querySelector(arguments[0])", selector)
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def text(browser: webdriver.Chrome, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0]).innerText", selector))


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    return list(
        browser.execute_script("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", selector)
    )
