import dataclasses
import re
import subprocess
import sys

import pytest

from qtune_companion.cli import _parser, main
from qtune_companion.recipes import FinetuneConfig


@pytest.fixture
def qtune(capsys, monkeypatch):
    """Runs the command in this process; gives its status and what it wrote to stdout and stderr."""
    for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        monkeypatch.setenv(name, value)  # the command sets them; here they are taken back

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([*map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_command_line(tiny, tmp_path, qtune):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qtune_companion.cli", "finetune", "--epochs", "1", "--output", str(out)]
    command += ["--model", str(tiny / "model"), "--data", str(tiny / "data.jsonl")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Memory ledger" in run.stdout
    assert "grad_norm" not in run.stdout + run.stderr
    assert re.search(r"6/6 .*loss=\d", run.stderr), "no progress bar with the loss"
    assert "Accuracy before" in run.stdout
    assert (out / "adapter_model.safetensors").is_file()
    with_adapter = ("evaluate", "--model", tiny / "model", "--adapter", out)
    assert "on 8 records" in qtune(*with_adapter, "--data", tiny / "data.jsonl")[1]
    assert "on 48 records" in qtune(*with_adapter, "--data", tiny / "data.jsonl", "--split", "train")[1]
    assert (
        "has no records for the split fresh"
        in qtune(*with_adapter, "--data", tiny / "data.jsonl", "--split", "fresh")[2]
    )
    said = qtune(*with_adapter, "--data", tiny / "data.jsonl", "--scheme", "int8")[1]
    assert "14 layers: " in said
    own = tmp_path / "own.jsonl"
    own.write_text('{"speech": "On.", "move": "stay"}\n{"speech": "Off.", "move": "leave"}')
    assert "on 2 records" in qtune(*with_adapter, "--data", own, "--moves", "stay,leave")[1]
    assert "move 'stay' is not one of" in qtune(*with_adapter, "--data", own)[2]
    assert "on 192 records" in qtune(*with_adapter, "--split", "fresh")[1]
    settings = out / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"r": 16', '"r": 8'))
    status, _, complaint = qtune(*with_adapter, "--data", tiny / "data.jsonl")
    assert status == 2
    assert "is for another model or rank" in complaint.splitlines()[-1]
    assert "--resume" in qtune("finetune", "--help")[1]


def test_command_line_refuses_in_one_line(tmp_path, qtune):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"speech": "a", "move": "spy"}\n{"speech"')
    occupied = tmp_path / "file"
    occupied.write_text("precious")
    cases = {
        ("--data", broken): "line 2",
        ("--data", tmp_path / "none.jsonl"): "no data file",
        ("--data", tmp_path): "is a folder",
        ("--model", "x" * 5000): "",
        ("--moves", "spy,,rest"): "none of them empty",
        ("--epochs", "1" + 400 * "0"): "epochs must be at most 1,000,000",
        ("--rank", 10**9): "rank must be at most 576",
        ("--output", occupied): "is a file",
        ("--model", "gpt5"): "unknown model",
        ("--rank", "abc"): "argument --rank: invalid int value: 'abc'; see qtune finetune --help",
        ("--scheme", "nf5"): "argument --scheme: invalid choice: 'nf5'",
        ("--lr", "inf"): "lr must be positive, got inf",
    }
    for arguments, words in cases.items():
        status, _, complaint = qtune("finetune", "--output", tmp_path / "out", *arguments)
        assert status == 2
        lines = [line for line in complaint.splitlines() if line.startswith("qtune: ")]
        assert len(lines) == 1
        assert words in lines[0]
        assert "Traceback" not in complaint
    status, _, complaint = qtune("evaluate", "--split", "attic")
    splits = "train, validation, test, extra, families, fresh"
    assert (status, complaint) == (2, f"qtune: unknown split 'attic'; choose one of {splits}\n")
    assert occupied.read_text() == "precious"


def test_command_line_defaults_are_the_recipes():
    given = vars(_parser().parse_args(["finetune"]))
    given["train_on"] = tuple(given["train_on"].split("+"))
    fields = {f.name: f.default for f in dataclasses.fields(FinetuneConfig)}
    shared = given.keys() & fields.keys() - {"moves"}  # None there, the Count's eight here
    assert len(shared) > 12
    assert {k: given[k] for k in shared} == {k: fields[k] for k in shared}
