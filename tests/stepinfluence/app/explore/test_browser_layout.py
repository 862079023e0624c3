"""The pages on a phone and on a large screen, light and dark: nothing is cut off, and everything can be read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browsing import click, errors, needs_browser, open_page, resize, settled, until, webdriver
from serving import serving
from stepinfluence.app.view.explore import Explorer, write_page

pytestmark = needs_browser

OUTSIDE = """
  const wide = document.documentElement.clientWidth;
  const cut = (e) => { const s = getComputedStyle(e); return s.overflowX !== 'visible' || s.clipPath !== 'none'; };
  const hidden = (e) => e.parentElement !== null && (cut(e.parentElement) || hidden(e.parentElement));
  const sticksOut = (r) => r.width > 1 && (r.right > wide + 1 || r.left < -1);
  return [...document.querySelectorAll('body *')]
    .filter((e) => e.checkVisibility() && !hidden(e) && !e.closest('.skip, .js-plotly-plot, #js-plotly-tester'))
    .filter((e) => sticksOut(e.getBoundingClientRect()))
    .map((e) => `${e.tagName}.${e.className} ${e.id}`).slice(0, 5);
"""
# Contrast of texts with what is behind them (WCAG 2, 1.4.3).
FAINT = """
  const probe = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    probe.clearRect(0, 0, 1, 1); probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] > 250) return c; }
    return [255, 255, 255, 255];
  };
  const texts = [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() &&
    !e.closest('.js-plotly-plot, .skip') && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  const found = [];
  for (const e of texts) {
    const s = getComputedStyle(e), a = light(rgba(s.color)), b = light(behind(e)), size = parseFloat(s.fontSize);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = size >= 24 || (size >= 18.66 && Number(s.fontWeight) >= 700);
    const what = `${e.tagName}.${e.className} ${e.id} "${e.innerText.slice(0, 20)}" ${contrast.toFixed(2)}`;
    if (contrast < (large ? 3 : 4.5)) found.push(what);
  }
  return found.slice(0, 8);
"""
EMPTY = """
  const seen = (selector) => [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility());
  const charts = seen('.chart').filter((e) => !e.querySelector('.main-svg'));
  return [...charts, ...seen('.tokens').filter((e) => !e.childElementCount)].map((e) => e.id);
"""


@pytest.fixture(scope="module", params=["server", "file"])
def address(request: pytest.FixtureRequest, told: Explorer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "file":
        path = tmp_path_factory.mktemp("layout") / "words.html"
        write_page(told, path, queries=2, exactly=True, by_token=True, progress=False)
        yield path.as_uri()
        return
    with serving(told) as served:
        yield f"http://127.0.0.1:{served.port}/"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_pages_fit_and_can_be_read(browser: webdriver.Chrome, address: str, width: int, scheme: str) -> None:
    resize(browser, width, scheme)
    open_page(browser, f"{address}#q0")
    assert browser.execute_script("return document.documentElement.dataset.theme") == scheme
    until(browser, "return !document.getElementById('exact').hidden")
    click(browser, "#exact")
    until(browser, "return document.querySelector('td.exact') !== null")
    click(browser, "#helpful tr[data-row]")
    until(browser, "return !document.getElementById('pair').hidden")
    click(browser, "#by-token-button")
    until(browser, "return document.querySelectorAll('#token-boxes bdi').length > 0")
    look(browser)
    click(browser, "[data-tab=all]")
    until(browser, "return document.querySelectorAll('#all-helpful tr[data-row]').length > 0")
    settled(browser)
    click(browser, "#all-helpful tr[data-row]")
    until(browser, "return !document.getElementById('reverse').hidden")
    look(browser)
    assert errors(browser) == []


def look(browser: webdriver.Chrome) -> None:
    """Nothing sticks out, is too faint, or empty."""
    assert (
        browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        == 0
    )
    assert browser.execute_script(OUTSIDE) == []
    assert browser.execute_script(FAINT) == []
    assert browser.execute_script(EMPTY) == []
