"""Every page in a real browser, wide and narrow: nothing fails, nothing overflows, mathematics is set."""

import contextlib
import functools
import http.server
import json
import re
import threading
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import sync_playwright

from browser import FLAGS, find_browser

WIDTHS = {1280: 900, 390: 844}
HERE = re.compile(r"http://127\.0\.0\.1:|data:|blob:|about:")

# Text a reader sees, outside code, in which TeX or a table's ruler was left as it was typed.
RAW_TEX = r"""() => {
    const raw = /\|:?[-\u2013\u2014]+:?\||\\[(\[]|\$\$|\\[a-zA-Z]{2,}|\$[^$\s\d][^$]*\$/;
    const skipped = "script, style, code, pre, textarea, mjx-container, .highlight";
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const left = raw.test(node.data) && !node.parentElement.closest(skipped);
        if (left) found.push(node.data.trim().slice(0, 80));
    }
    for (const math of document.querySelectorAll(".math")) {
        if (!math.querySelector("mjx-container")) found.push("not set: " + math.textContent.slice(0, 80));
    }
    for (const error of document.querySelectorAll("mjx-merror, [data-mjx-error]")) {
        found.push("TeX error: " + (error.getAttribute("data-mjx-error") || error.textContent));
    }
    for (const unknown of document.querySelectorAll("mjx-container mjx-mtext[style*='red']")) {
        found.push("unknown TeX command in: " + unknown.closest("mjx-container").parentElement.className);
    }
    return found;
}"""

# docutils writes the file's name as alt text when the author wrote none.
NO_ALT = r"""() => [...document.querySelectorAll("img")]
    .filter(image => !(image.alt || "").trim() || /\.(png|svg|jpe?g|gif)$/i.test(image.alt))
    .map(image => image.getAttribute("src"))"""

BROKEN_IMAGES = """() => [...document.querySelectorAll("img")]
    .filter(image => image.complete && image.naturalWidth === 0)
    .map(image => image.getAttribute("src"))"""

OVERFLOW = (
    """() => Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - window.innerWidth"""
)

# A display equation that is wider than its column scrolls, and its number covers its end.
CRAMPED = """() => [...document.querySelectorAll("div.math")]
    .filter(math => [math, ...math.querySelectorAll("mjx-container")].some(m => m.scrollWidth > m.clientWidth + 1))
    .map(math => math.id || math.textContent.slice(0, 80))"""

SEARCH_FIELDS = """() => [
    ...document.querySelectorAll("nav, header, aside, .bd-header, .sidebar-primary-item")
].flatMap(area => [...area.querySelectorAll(".search-button-field, .search-button, input[type=search]")])
    .filter((field, index, all) => all.indexOf(field) === index && field.checkVisibility())
    .filter(field => field.getBoundingClientRect().right > 0).length"""


@dataclass
class Visit:
    """What was seen on one page at one width."""

    width: int
    messages: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    raw_tex: list[str] = field(default_factory=list)
    no_alt: list[str] = field(default_factory=list)
    broken_images: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    misjudged: list[str] = field(default_factory=list)
    quizzes: int = 0
    cramped: list[str] = field(default_factory=list)
    overflow: int = 0
    search_fields: int = 0


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log line for each."""

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    assert path, "no Chromium found; run `python scripts/browser.py --install`"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


def open_page(browser, url, width, visit):
    page = browser.new_page(viewport={"width": width, "height": WIDTHS[width]})
    page.on("console", lambda m: visit.messages.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: visit.messages.append(str(e)))
    page.on("request", lambda r: None if HERE.match(r.url) else visit.failed.append(f"asks {r.url}"))
    page.on("requestfailed", lambda r: visit.failed.append(f"{r.url}: {r.failure}"))
    page.on("response", lambda r: visit.failed.append(f"{r.url}: {r.status}") if r.status >= 400 else None)
    page.goto(url, wait_until="load")
    page.wait_for_load_state("networkidle")
    with contextlib.suppress(PlaywrightTimeout):  # what is still there then is reported
        page.wait_for_function(f"() => ({RAW_TEX})().length === 0", timeout=5000)
    return page


def unanswered_questions(page):
    """The questions with buttons that stay silent when the first is clicked."""
    silent = []
    for question in page.locator(".Quiz:has(.MCButton)").all():
        question.locator(".MCButton").first.click()
        if not question.locator(".Feedback").inner_text().strip():
            silent.append(question.inner_text()[:60])
    return silent


def misjudged_numbers(page):
    """What a question that wants a number says to each of the numbers it names, where that is not its own feedback."""
    wrong = []
    for question in page.locator(".Quiz:has(.Input-text)").all():
        field, feedback = question.locator(".Input-text"), question.locator(".Feedback")
        for answer in json.loads(field.get_attribute("data-answers")):
            numbers = [answer["value"]] if "value" in answer else answer.get("range", [])
            if not numbers:
                continue
            field.fill(f"{sum(numbers) / len(numbers):.6g}")  # of a range, its middle
            field.press("Enter")
            right = "correct" in feedback.get_attribute("class").split()
            said, meant = feedback.inner_text().strip(), answer["feedback"]
            if right != answer["correct"] or ("$" not in meant and said != meant):
                wrong.append(f"to {field.input_value()} it says {said!r}")
    return wrong


@pytest.fixture(scope="module")
def visits(browser, address, pages):
    """Every page opened once at every width."""
    seen = {}
    for path in pages:
        for width in WIDTHS:
            visit = seen[f"{path} at {width}"] = Visit(width)
            page = open_page(browser, f"{address}/{path.as_posix()}", width, visit)
            visit.raw_tex = page.evaluate(RAW_TEX)
            visit.no_alt = page.evaluate(NO_ALT)
            visit.broken_images = page.evaluate(BROKEN_IMAGES)
            visit.cramped = page.evaluate(CRAMPED)
            visit.overflow = page.evaluate(OVERFLOW)
            visit.search_fields = page.evaluate(SEARCH_FIELDS)
            visit.quizzes = page.locator(".Quiz").count()
            if width == 1280:
                visit.unanswered, visit.misjudged = unanswered_questions(page), misjudged_numbers(page)
            page.close()
    return seen


@pytest.mark.parametrize(
    ("what", "meaning"),
    [
        ("messages", "the console shows errors"),
        ("failed", "requests failed"),
        ("raw_tex", "TeX or a table is not set"),
        ("no_alt", "images have no alt text"),
        ("broken_images", "images do not show"),
    ],
)
def test_pages_show_no(visits, what, meaning):
    found = {page: getattr(visit, what) for page, visit in visits.items() if getattr(visit, what)}
    assert not found, f"{meaning}: " + "\n".join(f"{page}: {problems}" for page, problems in found.items())


def test_no_page_is_wider_than_the_window(visits):
    wide = {page: visit.overflow for page, visit in visits.items() if visit.overflow > 1}
    assert not wide, f"pixels beyond the window: {wide}"


def test_equations_fit_their_column_on_a_wide_page(visits):
    wide = {page: visit.cramped for page, visit in visits.items() if visit.width == 1280 and visit.cramped}
    assert not wide, f"break these equations over two lines: {wide}"


def test_there_is_one_search_field(visits):
    counts = {page: visit.search_fields for page, visit in visits.items()}
    twice = {page: n for page, n in counts.items() if n > 1}
    none = {page: n for page, n in counts.items() if n < 1 and visits[page].width == 1280}
    assert not twice | none, f"search fields: {twice | none}"


def test_every_quiz_shows_questions_and_answers_a_click(visits, site, pages):
    with_quiz = [p for p in pages if "display_quiz" in (site / p).read_text(encoding="utf-8")]
    assert len(with_quiz) >= 10
    empty = [str(p) for p in with_quiz if not visits[f"{p} at 1280"].quizzes]
    assert not empty, f"no question is shown: {empty}"
    silent = {page: visit.unanswered for page, visit in visits.items() if visit.unanswered}
    assert not silent, f"no feedback on a click: {silent}"
    misjudged = {page: visit.misjudged for page, visit in visits.items() if visit.misjudged}
    assert not misjudged, f"numbers that get another feedback than theirs: {misjudged}"
