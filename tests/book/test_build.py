"""The site builds without a warning, its links lead somewhere, and its pages load nothing from elsewhere."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from notebooks import BOOK, chapters

RESOURCES = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
LOADING_RELS = {"stylesheet", "preload", "icon", "modulepreload", "prefetch", "preconnect"}


@pytest.fixture(scope="module")
def soups(site, pages):
    return {page: BeautifulSoup((site / page).read_text(encoding="utf-8"), "html.parser") for page in pages}


def is_elsewhere(url):
    return bool(urlsplit(url).netloc) or urlsplit(url).scheme not in ("", "data")


def resources(soup):
    for tag, attribute in RESOURCES.items():
        yield from (t[attribute] for t in soup.find_all(tag) if t.get(attribute))
    for link in soup.find_all("link", href=True):
        if LOADING_RELS & set(link.get("rel", [])):
            yield link["href"]


def test_every_page_is_built(pages):
    written = [p for p in BOOK.rglob("*.md") if "_build" not in p.parts]
    expected = {p.relative_to(BOOK).with_suffix(".html") for p in written}
    assert expected <= set(pages)
    assert len(chapters()) <= len(pages)


def test_internal_links_resolve(site, soups):
    anchors = {p: {t.get("id") or t.get("name") for t in s.find_all(True)} for p, s in soups.items()}
    broken = []
    for page, soup in soups.items():
        for tag in soup.find_all("a", href=True):
            url = urlsplit(tag["href"])
            if url.scheme or url.netloc or tag["href"] in ("", "#"):
                continue
            target = (site / page).parent / unquote(url.path) if url.path else site / page
            if not target.is_file():
                broken.append(f"{page}: {tag['href']} (no such page)")
                continue
            there = Path(target.resolve().relative_to(site.resolve()))
            if url.fragment and there in anchors and unquote(url.fragment) not in anchors[there]:
                broken.append(f"{page}: {tag['href']} (no such anchor)")
    assert not broken, "\n".join(broken)


def test_pages_load_nothing_from_elsewhere(soups):
    loaded = [
        f"{page}: {url}" for page, soup in soups.items() for url in resources(soup) if is_elsewhere(url)
    ]
    assert not loaded, "\n".join(loaded)
    inline = re.compile(r"https?://[\w.-]*(cdn|unpkg|jsdelivr|googleapis|cloudflare)[\w./-]*")
    scripts = [(page, s.string or "") for page, soup in soups.items() for s in soup.find_all("script")]
    named = [f"{page}: {m.group(0)}" for page, text in scripts for m in inline.finditer(text)]
    assert not named, "inline scripts name a CDN:\n" + "\n".join(named)


def test_local_resources_exist(site, soups):
    missing = []
    for page, soup in soups.items():
        for url in resources(soup):
            path = "" if url.startswith("data:") else unquote(urlsplit(url).path)  # data is there already
            if not is_elsewhere(url) and path and not ((site / page).parent / path).is_file():
                missing.append(f"{page}: {url}")
    assert not missing, "\n".join(missing)


def test_stylesheets_import_nothing_from_elsewhere(site):
    remote = re.compile(r"(?:url\(|@import)\s*['\"]?\s*(?:https?:)?//[^)'\"]+")
    found = [
        f"{p.name}: {m}" for p in site.rglob("*.css") for m in remote.findall(p.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
