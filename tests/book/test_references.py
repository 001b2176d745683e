"""The bibliography is sound: every citation has an entry, and every entry says where its work is found."""

import re

import pytest
from pybtex import errors
from pybtex.database import parse_file

from notebooks import BOOK

BIBLIOGRAPHY = BOOK / "references.bib"
CITATION = re.compile(r"\{cite(?::[\w:]+)?\}`([^`]+)`")
errors.set_strict_mode(False)  # a repeated key is for the tests to report, not for the parser
ENTRIES = parse_file(str(BIBLIOGRAPHY)).entries


def cited():
    pages = [p for p in BOOK.rglob("*.md") if "_build" not in p.parts]
    for page in pages:
        for match in CITATION.finditer(page.read_text(encoding="utf-8")):
            for key in match.group(1).split(","):
                yield page.relative_to(BOOK).as_posix(), key.strip()


def test_every_citation_has_an_entry():
    unknown = [f"{page}: {key}" for page, key in cited() if key not in ENTRIES]
    assert not unknown, "\n".join(unknown)


def test_no_key_is_there_twice():
    keys = re.findall(r"^@\w+\{([^,\s]+)", BIBLIOGRAPHY.read_text(encoding="utf-8"), re.MULTILINE)
    twice = {key for key in keys if [k.lower() for k in keys].count(key.lower()) > 1}
    assert not twice
    assert len(keys) == len(ENTRIES)


@pytest.mark.parametrize("key", list(ENTRIES))
def test_entry_says_where_to_find_it(key):
    entry = ENTRIES[key]
    assert {"title", "year"} <= set(entry.fields)
    assert entry.persons.get("author"), f"{key} has no author"
    if "eprint" in entry.fields:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.fields["eprint"]), f"{key}: not an arXiv number"
        assert entry.fields["url"] == f"https://arxiv.org/abs/{entry.fields['eprint']}"
    else:
        assert "doi" in entry.fields or entry.fields.get("url", "").startswith("https://")
