"""What the corpus promises: no move named, no near-duplicates, balance, length, encoding, splits fixed by id."""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from qtune_companion.dracula import FEINT, MOVES, PROMPT, load_journal, load_speeches
from qtune_companion.models import load_tokenizer

ROWS = list(load_speeches())
FURTHER = {split: list(load_speeches("castle", split)) for split in ("extra", "families", "fresh")}
ALL = ROWS + [row for rows in FURTHER.values() for row in rows]
FORMS = {
    "attack": r"(counter)?attack\w*", "hide": r"hid(e|es|ing|den)?|hideous", "travel": r"travel\w*",
    "feed": r"(over|un|under|well)?(feed\w*|fed)", "lure": r"lur(e|es|ed|ing)|allur\w*",
    "rest": r"(un)?rest(s|ed|ing|ful\w*|less\w*|ive)?", "spy": r"sp(y|ies|ied|ying)|spy\w*", "bargain": r"bargain\w*",
}  # fmt: skip
SIZES = {("castle", "train"): 60, ("castle", "validation"): 15, ("castle", "test"): 25,
         ("code", "train"): 25, ("code", "validation"): 5, ("code", "test"): 20}  # fmt: skip


def tokens(text):
    return re.findall(r"[^\W_]+", text.lower())


def test_no_speech_names_a_move():
    pattern = re.compile(rf"\b({'|'.join(FORMS.values())})\b", re.IGNORECASE)
    assert pattern.search("The spies rested.").group() == "spies"
    found = [(r["id"], m.group()) for r in ALL if (m := pattern.search(r["speech"]))]
    assert not found


def test_balance_and_splits():
    assert Counter((r["phase"], r["split"], r["meaning"]) for r in ROWS) == {
        (*part, move): n for part, n in SIZES.items() for move in MOVES
    }


def test_the_split_is_fixed_by_the_id():
    groups = defaultdict(list)
    for r in ROWS:
        groups[r["phase"], r["meaning"]].append(r)
    for (phase, _), rows in groups.items():
        rows.sort(key=lambda r: hashlib.sha256(r["id"].encode()).hexdigest())
        order = [s for s in ("train", "validation", "test") for _ in range(SIZES[phase, s])]
        assert [r["split"] for r in rows] == order


def test_meaning_and_move():
    assert sorted(FEINT) == sorted(FEINT.values()) == sorted(MOVES)
    for r in ROWS:
        assert r["move"] == (r["meaning"] if r["phase"] == "castle" else FEINT[r["meaning"]]), r["id"]


def test_ids_and_texts_are_unique():
    assert len(ROWS) == 1200
    assert len({r["id"] for r in ALL}) == len({r["speech"] for r in ALL}) == len(ALL)


@pytest.mark.parametrize(("split", "a_move"), [("extra", 96), ("families", 120), ("fresh", 24)])
def test_the_further_speeches_are_castle_speeches_in_equal_numbers(split, a_move):
    rows = FURTHER[split]
    assert Counter(r["move"] for r in rows) == dict.fromkeys(MOVES, a_move)
    assert {(r["phase"], r["split"]) for r in rows} == {("castle", split)}
    assert all(r["meaning"] == r["move"] for r in rows)
    with pytest.raises(ValueError, match=f"phase 'code' has no split '{split}'"):
        load_speeches("code", split)


def test_a_family_has_four_moves_in_one_scene():
    rows = FURTHER["families"]
    fours = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    assert all(len({r["move"] for r in four}) == 4 for four in fours)
    words = [{w for w in tokens(r["speech"]) if len(w) > 3} for r in rows]
    alike = [len(words[i] & words[j]) for i in range(len(rows)) for j in range(i // 4 * 4, i)]
    apart = [
        len(words[i] & words[i - 4]) for i in range(4, len(rows))
    ]  # its neighbor in the list, another scene
    assert sum(alike) / len(alike) > 3 * sum(apart) / len(apart)


def test_length_in_words_and_tokens():
    assert all(20 <= len(r["speech"].split()) <= 60 for r in ALL)
    for name in ("smollm2-135m", "minilm-l6"):
        tokenizer = load_tokenizer(name)
        prompts = [PROMPT.replace("{speech}", r["speech"]) for r in ALL]
        assert max(len(ids) for ids in tokenizer(prompts).input_ids) <= 128
        for move in MOVES:
            text = move if tokenizer.mask_token_id is not None else f" {move}"
            assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1


def test_encoding():
    for r in ALL:
        text = r["speech"]
        assert text == unicodedata.normalize("NFC", text).strip()
        assert not re.search(r"[^\x20-\x7eÀ-ɏ]|  ", text), r[
            "id"
        ]  # ASCII, and accented Latin letters in names


def test_no_near_duplicates():
    grams = [{tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in (tokens(r["speech"]) for r in ALL)]
    where = defaultdict(list)
    for i, found in enumerate(grams):
        for gram in found:
            where[gram].append(i)
    shared = Counter(pair for rows in where.values() for pair in combinations(rows, 2))
    close = [
        (ALL[a]["id"], ALL[b]["id"], n)
        for (a, b), n in shared.items()
        if n / min(len(grams[a]), len(grams[b])) > 0.2
    ]
    assert not close


def test_no_two_begin_alike():
    starts = Counter(tuple(tokens(r["speech"])[:5]) for r in ALL)
    assert [s for s, n in starts.items() if n > 1] == []


def test_american_spelling():
    british = re.compile(
        r"\b\w*(colour|honour|favour|neighbour|harbour|armour|parlour|grey|theatre|mould|jewellery|realis|apologis)\w*",
        re.I,
    )
    assert [r["id"] for r in ALL if british.search(r["speech"])] == []


def test_bag_of_words_is_clearly_below_the_target():
    train, test = load_speeches("castle", "train"), load_speeches("castle", "test")
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=1000))
    accuracy = model.fit(train["speech"], train["move"]).score(test["speech"], test["move"])
    assert 2 / 8 < accuracy < 0.55


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_journal(split):
    text = load_journal(split)
    assert len(text.split()) >= 5000
    assert unicodedata.normalize("NFC", text) == text
    headings = re.findall(r"^== .*==$", text, re.MULTILINE)
    assert len(headings) >= 8
    paragraphs = [p for p in text.split("\n\n") if len(p.split()) > 12]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not re.search(r"[^\n\x20-\x7eÀ-ɏ]", text)
    speeches = {tuple(w[i : i + 8]) for r in ALL for w in [tokens(r["speech"])] for i in range(len(w) - 7)}
    words = tokens(text)
    assert not speeches & {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
