import json

import pytest

from qtune_companion.dracula import MOVES, load_journal, load_records, load_speeches, to_prompts


def test_parts_add_up():
    assert len(load_speeches()) == 1200
    assert len(load_speeches("castle")) == 800
    assert len(load_speeches("code", "test")) == 160
    assert load_speeches().column_names == ["id", "speech", "meaning", "move", "phase", "split"]


def test_prompts_hold_the_speech_and_the_answer():
    speeches = load_speeches("code", "validation")
    row = to_prompts(speeches)[0]
    assert row["prompt"] == f'Dracula said: "{speeches[0]["speech"]}"\nTonight the Count will'
    assert row["completion"] == f" {speeches[0]['move']}"
    assert to_prompts(speeches, target="meaning")[0]["completion"] == f" {speeches[0]['meaning']}"
    with pytest.raises(ValueError, match="exactly once"):
        to_prompts(speeches, template="no hole")


def test_journal_halves():
    whole, first, second = load_journal(), load_journal("calibration"), load_journal("evaluation")
    assert first in whole
    assert second in whole
    assert "===" not in whole


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="'crypt'; choose one of castle, code"):
        load_speeches("crypt")
    with pytest.raises(ValueError, match="'dev'; choose one of train"):
        load_speeches(split="dev")
    with pytest.raises(ValueError, match="calibration, evaluation"):
        load_journal("both")


def test_own_records(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"speech": "Bring the ladder.", "move": "spy"}\n\n{"speech": "Äh.", "move": "rest"}\n', "utf-8"
    )
    assert load_records(path)["move"] == ["spy", "rest"]


GOOD = json.dumps({"speech": "a", "move": "spy"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no records"),
        (b"\n \n", "holds no records"),
        (GOOD.encode() + b'\n{"speech": "a", "mov', "line 2: not a line of JSON"),
        (b"[" * 100_000, "line 1: not a line of JSON"),
        (
            GOOD.encode() + b'\n{"speech": "\\ud800", "move": "spy"}',
            "line 2: the speech holds half a character",
        ),
        (b'\xff\xfe{"a": 1}', "line 1: not a line of JSON in UTF-8"),
        (b"[1, 2]", "line 1: needs an object"),
        (b'{"speech": "", "move": "spy"}', "line 1: needs a text field 'speech'"),
        (b'{"speech": "a"}', "line 1: needs a text field 'move'"),
        (b'{"speech": "a", "move": "fly"}', f"line 1: move 'fly' is not one of {', '.join(MOVES)}"),
        (b'{"speech": "a", "move": "spy", "split": "dev"}', "line 1: split 'dev'"),
        (b'{"speech": "a", "move": "spy", "split": "test"}\n\n' + GOOD.encode(), "line 3: names no split"),
        (GOOD.encode() + b'\n{"speech": "a", "move": "spy", "split": "test"}', "line 1: names no split"),
    ],
)
def test_bad_records_name_file_and_line(tmp_path, content, words):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_records(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_records(tmp_path / "nowhere.jsonl")
