"""A report in a real browser: nothing is asked of the network, nothing overflows, the keyboard reaches everything."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localsim.analysis.report import SECTIONS

BROWSER = os.environ.get("LOCALSIM_CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
     if (found := shutil.which(name))), None,
)  # fmt: skip
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome on PATH, and LOCALSIM_CHROMIUM names none"
)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip
PHONE, DESK = (360, 740), (1280, 900)

OVERFLOWING = """
[document.scrollingElement.scrollWidth - innerWidth,
 [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right >
   innerWidth + 1).map(e => e.outerHTML.slice(0, 80))]
"""
SCROLLING = """
[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length
"""
PICTURES = """
[...document.images].map(i => [i.alt.length, i.naturalWidth, i.getBoundingClientRect().width])
"""
FOCUSED = """
(e => [e.tagName, e.className, e.getAttribute('href') || '', getComputedStyle(e).outlineStyle,
       e.getBoundingClientRect().left >= 0])(document.activeElement)
"""
STOPS = """
[...document.querySelectorAll('a, [tabindex="0"], summary')].filter(e => e.checkVisibility()).length
"""
FAINT = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const under = e => { for (; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor); if (colour[3]) return colour; } return [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(under(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found.push([e.tagName, ratio]);
  }
  return found;
})()
"""


class Chromium:
    """A browser that is driven by its DevTools protocol over a pair of pipes, which takes the standard library only."""

    def __init__(self, profile: Path) -> None:
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()

        def as_three_and_four() -> None:  # where --remote-debugging-pipe looks; copies first, for these may be 3 or 4
            reading, writing = os.dup(to_browser), os.dup(from_browser)
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        self.process = subprocess.Popen(
            [str(BROWSER), *QUIET, f"--user-data-dir={profile}", "about:blank"], preexec_fn=as_three_and_four,
            close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.rest, self.session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            got = os.read(self.read_end, 2**16)
            assert got, "the browser has gone"
            self.rest += got
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def open(self, page: Path, size: tuple[int, int] = DESK, **features: str) -> None:
        """Open a page on a screen of this size, with media features such as `prefers_color_scheme="dark"`."""
        self.events.clear()
        shown = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **shown)
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression: str) -> Any:
        """Return the value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Return what the console says, errors of scripts, and refusals of the page's own policy."""
        self.ask("1")
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        """Return where the page has asked for anything, data of its own left out."""
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event.get("method") == "Network.requestWillBeSent"]  # fmt: skip
        return [url for url in asked if not url.startswith("data:")]

    def tab(self) -> list[Any]:
        """Press the key and return what has the focus: element, class, link, outline, whether it is on the screen."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        return self.ask(FOCUSED)

    def close(self) -> None:
        self.session = ""
        try:
            self.call("Browser.close")
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.write_end)
            os.close(self.read_end)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Chromium]:
    opened = Chromium(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def test_nothing_is_complained_of_and_nothing_asked_of_the_network(browser, whole_page):
    browser.open(whole_page)
    assert browser.complaints() == []
    assert browser.requests() == [whole_page.as_uri()]
    assert browser.ask("document.querySelectorAll('section').length") == len(SECTIONS)
    assert "system-ui" in browser.ask("getComputedStyle(document.body).fontFamily"), "the style is let through"


def test_every_picture_is_there_and_has_words_for_it(browser, whole_page):
    browser.open(whole_page)
    found = browser.ask(PICTURES)
    assert len(found) >= 5 and all(alt > 40 and natural > 0 and shown > 100 for alt, natural, shown in found)


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_page_does_not_overflow_though_what_is_wide_scrolls(browser, whole_page, size):
    browser.open(whole_page, size)
    beyond, found = browser.ask(OVERFLOWING)
    assert beyond <= 0 and found == []
    assert browser.ask(SCROLLING) >= (4 if size == PHONE else 0)
    assert browser.ask("innerWidth") == size[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_words_stand_out(browser, whole_page, scheme):
    browser.open(whole_page, prefers_color_scheme=scheme)
    browser.ask("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.ask(FAINT) == []
    paper = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert browser.ask("getComputedStyle(document.querySelector('.card')).backgroundColor") == "rgb(255, 255, 255)"


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser, whole_page):
    browser.open(whole_page, PHONE)
    stops = [browser.tab() for _ in range(browser.ask(STOPS))]
    assert stops[0] == ["A", "skip", "#main", "solid", True]
    assert [stop[2] for stop in stops[1 : len(SECTIONS) + 1]] == [f"#{name}" for name in SECTIONS]
    assert sum(stop[1] == "scroll" for stop in stops) >= 10 and sum(stop[0] == "SUMMARY" for stop in stops) >= 3
    assert all(outline == "solid" for *_, outline, _ in stops)


def test_regions_and_headings_are_named_for_screen_readers(browser, whole_page):
    browser.open(whole_page)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node]
    for role, at_least in (("main", 1), ("navigation", 1), ("region", 15), ("image", 5), ("table", 8), ("heading", 10)):
        named = [name for kind, name in found if kind == role]
        assert len(named) >= at_least and (role == "main" or all(named)), (role, named)


def test_it_prints_whole_with_what_was_folded(browser, whole_page, tmp_path):
    browser.open(whole_page)
    found = browser.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
    (tmp_path / "page.pdf").write_bytes(base64.b64decode(found["data"]))
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF") and (tmp_path / "page.pdf").stat().st_size > 30_000
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    folded = "[...document.querySelectorAll('details pre')].map(e => e.checkVisibility({contentVisibilityAuto: true}))"
    shown = browser.ask(f"{folded}.concat([document.querySelector('details').getBoundingClientRect().height > 100])")
    assert len(shown) >= 3 and all(shown)


def test_a_page_that_is_broken_is_found_out(browser, tmp_path):
    """What the tests above look for does happen: each of them would fail on this page."""
    page = tmp_path / "broken.html"
    page.write_text(
        "<!DOCTYPE html><html><head><meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
        "<meta name=viewport content='width=device-width'></head><body><main style='color: red'>"
        "<img src='http://127.0.0.1:9/missing.png'><script>window.ran = 1</script>"
        "<table width=2000 height=20><tr><td bgcolor=#666666>faint</table></main></body></html>"
    )
    browser.open(page, PHONE)
    complaints = " ".join(browser.complaints())
    assert all(word in complaints for word in ("style-src", "img-src", "script-src"))
    assert browser.ask("typeof window.ran") == "undefined"
    assert browser.ask(OVERFLOWING)[1], "something lies beyond the screen"
    assert browser.ask(PICTURES)[0][:2] == [0, 0] and browser.ask(SCROLLING) == 0
    assert [name for name, _ in browser.ask(FAINT)] == ["TD"]
    assert browser.tab()[1] != "skip"
