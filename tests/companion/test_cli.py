import dataclasses
import re
import subprocess
import sys

from qtune_companion.recipes import FinetuneConfig


def cli(*arguments):
    command = [sys.executable, "-m", "qtune_companion.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line(tiny, tmp_path):
    out = tmp_path / "out"
    run = cli(
        "finetune", "--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", out, "--epochs", 1
    )
    assert run.returncode == 0, run.stderr
    assert "Memory ledger" in run.stdout
    assert "grad_norm" not in run.stdout + run.stderr
    assert re.search(r"6/6 .*loss=\d", run.stderr), "no progress bar with the loss"
    assert "Accuracy before" in run.stdout
    assert (out / "adapter_model.safetensors").is_file()
    check = cli("evaluate", "--model", tiny / "model", "--adapter", out, "--data", tiny / "data.jsonl")
    assert check.returncode == 0, check.stderr
    assert "on 56 records" in check.stdout
    (out / "adapter_config.json").write_text(
        (out / "adapter_config.json").read_text().replace('"r": 16', '"r": 8')
    )
    unfit = cli("evaluate", "--model", tiny / "model", "--adapter", out, "--data", tiny / "data.jsonl")
    assert unfit.returncode == 2
    assert "is for another model or rank" in unfit.stderr.splitlines()[-1]
    (out / "adapter_config.json").write_text(
        (out / "adapter_config.json").read_text().replace('"r": 8', '"r": 16')
    )
    fresh = cli("evaluate", "--model", tiny / "model", "--adapter", out, "--split", "fresh")
    assert "on 192 records" in fresh.stdout, fresh.stderr
    refused = cli("evaluate", "--split", "attic")
    assert refused.returncode == 2
    assert (
        "unknown split 'attic'; choose one of train, validation, test, extra, families, fresh"
        in refused.stderr
    )
    assert "--resume" in cli("finetune", "--help").stdout


def test_command_line_refuses_in_one_line(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"speech": "a", "move": "spy"}\n{"speech"')
    occupied = tmp_path / "file"
    occupied.write_text("precious")
    cases = {
        ("--data", broken): "line 2",
        ("--data", tmp_path / "none.jsonl"): "no data file",
        ("--output", occupied): "is a file",
        ("--model", "gpt5"): "unknown model",
        ("--rank", "abc"): "argument --rank: invalid int value: 'abc'; see qtune finetune --help",
        ("--scheme", "nf5"): "argument --scheme: invalid choice: 'nf5'",
        ("--lr", "inf"): "lr must be positive, got inf",
    }
    for arguments, words in cases.items():
        run = cli("finetune", "--output", tmp_path / "out", *arguments)
        assert run.returncode == 2, run.stderr
        lines = [line for line in run.stderr.splitlines() if line.startswith("qtune: ")]
        assert len(lines) == 1
        assert words in lines[0]
        assert "Traceback" not in run.stderr
    assert occupied.read_text() == "precious"


def test_command_line_defaults_are_the_recipes():
    from qtune_companion.cli import _parser

    given = vars(_parser().parse_args(["finetune"]))
    given["train_on"] = tuple(given["train_on"].split("+"))
    fields = {f.name: f.default for f in dataclasses.fields(FinetuneConfig)}
    shared = given.keys() & fields.keys() - {"moves"}  # None there, the Count's eight here
    assert len(shared) > 12
    assert {k: given[k] for k in shared} == {k: fields[k] for k in shared}
