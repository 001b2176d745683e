import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from qtune_companion.dracula import load_speeches
from qtune_companion.models import load_tokenizer
from qtune_companion.recipes import FinetuneConfig, finetune
from qtune_companion.trainer import newest_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a small Llama with the embedded model's tokenizer, and a data file of 48 speeches."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    ))  # fmt: skip
    model.save_pretrained(folder / "model")
    load_tokenizer().save_pretrained(folder / "model")
    rows = load_speeches("castle", "train").select(range(48))
    lines = [json.dumps({"speech": r["speech"], "move": r["move"], "split": "train"}) for r in rows]
    test = load_speeches("castle", "test").select(range(8))
    lines += [json.dumps({"speech": r["speech"], "move": r["move"], "split": "test"}) for r in test]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def config(tiny, output, **changes):
    values = {"model": str(tiny / "model"), "data": str(tiny / "data.jsonl"), "output": str(output)}
    values |= {
        "epochs": 2,
        "batch_size": 4,
        "save_steps": 3,
        "dropout": 0.1,
        "progress": False,
        "compute": "fp32",
    }
    return FinetuneConfig(**(values | changes))


def test_trains_saves_and_peft_loads(tiny, tmp_path):
    result = finetune(config(tiny, tmp_path / "out"))
    assert len(result.losses) == 24
    assert result.losses[-1] < result.losses[0]
    assert 0 <= result.accuracy_after <= 1
    assert 4 < result.bits_per_weight < 5
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    PeftModel.from_pretrained(base, tmp_path / "out")
    for sub in tmp_path.rglob("*"):
        assert sub.suffix != ".bin"


def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path):
    whole = tmp_path / "whole"
    finetune(config(tiny, whole))
    killed = tmp_path / "killed"
    arguments = [sys.executable, "-m", "qtune_companion.cli", "finetune", "--model", str(tiny / "model"),
                 "--data", str(tiny / "data.jsonl"), "--output", str(killed), "--epochs", "2", "--batch-size", "4",
                 "--save-steps", "3", "--dropout", "0.1", "--compute", "fp32"]  # fmt: skip
    run = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not newest_checkpoint(killed / "checkpoints"):
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (killed / "adapter_model.safetensors").exists()
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "unfinished run" in again.stderr
    resumed = subprocess.run([*arguments, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    a, b = load_file(whole / "adapter_model.safetensors"), load_file(killed / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


class Watch(TrainerCallback):
    """Keeps one weight of each step; can end the run with an error, as a power cut does."""

    def __init__(self, name, end=None):
        self.name, self.end, self.seen = name, end, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.get_submodule(self.name).lora_B.detach().clone())
        if state.global_step == self.end:
            raise RuntimeError("power cut")


def test_adapter_is_the_mean_over_the_last_steps(tiny, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    watch = Watch(name)
    result = finetune(config(tiny, tmp_path, average=0.25), callbacks=[watch])
    got = result.model.get_submodule(name).lora_B.detach()
    assert len(watch.seen) == 24
    torch.testing.assert_close(got, torch.stack(watch.seen[-6:]).mean(0))
    assert not torch.allclose(got, watch.seen[-1])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.model.{name}.lora_B.weight"], got)


def test_resumed_amid_the_averaging_equals_uninterrupted(tiny, tmp_path):
    finetune(config(tiny, tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(config(tiny, tmp_path / "cut"), callbacks=[Watch("model.layers.0.mlp.up_proj", end=20)])
    assert newest_checkpoint(tmp_path / "cut" / "checkpoints").name == "checkpoint-18"
    finetune(config(tiny, tmp_path / "cut", resume=True))
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_broken_checkpoint_is_passed_over(tmp_path):
    from qtune_companion.trainer import _CHECKPOINT_FILES

    for step in (3, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in _CHECKPOINT_FILES:
            (tmp_path / f"checkpoint-{step}" / name).touch()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"half')
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"


def test_resuming_with_other_settings_is_refused(tiny, tmp_path):
    finetune(config(tiny, tmp_path, max_steps=3, lr=1e-3))
    with pytest.raises(ValueError, match=r"cannot resume .*: lr was 0\.001, now 0\.1"):
        finetune(config(tiny, tmp_path, resume=True, lr=0.1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"prompt_weight": -0.1}, "prompt_weight must be 0 or more, got -0.1"),
        ({"average": 1.5}, "average must be a share, 0 to 1, got 1.5"),
        (
            {"train_on": ("train", "test")},
            r"train_on must name train, validation, extra, families or several, got 'train\+test'",
        ),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"compute": "fp8"}, "got 'fp8'"),
        ({"model": "nothing"}, "unknown model 'nothing'"),
        ({"scheme": "nf5"}, "unknown scheme 'nf5'"),
        ({"model": "minilm-l6"}, "is an encoder"),
        ({"moves": ("attack", "flee")}, "is not one of attack, flee"),
    ],
)
def test_bad_values_are_named(tiny, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        finetune(config(tiny, tmp_path / "out", **changes))


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
    fresh = cli("evaluate", "--model", tiny / "model", "--adapter", out, "--split", "fresh")
    assert "on 192 records" in fresh.stdout, fresh.stderr
    refused = cli("evaluate", "--split", "attic")
    assert refused.returncode == 2
    assert (
        "unknown split 'attic'; choose one of train, validation, test, extra, families, fresh"
        in refused.stderr
    )
    assert "--resume" in cli("finetune", "--help").stdout


def test_command_line_refuses_in_one_line(tiny, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"speech": "a", "move": "spy"}\n{"speech"')
    occupied = tmp_path / "file"
    occupied.write_text("precious")
    cases = {
        ("--data", broken): "line 2",
        ("--data", tmp_path / "none.jsonl"): "no data file",
        ("--output", occupied): "is a file",
        ("--model", "gpt5"): "unknown model",
    }
    for arguments, words in cases.items():
        run = cli("finetune", "--output", tmp_path / "out", *arguments)
        assert run.returncode == 2, run.stderr
        lines = [line for line in run.stderr.splitlines() if line.startswith("qtune: ")]
        assert len(lines) == 1
        assert words in lines[0]
        assert "Traceback" not in run.stderr
    assert occupied.read_text() == "precious"


def test_an_output_that_cannot_be_written_is_named(tiny, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(ValueError, match=r"is not writable \(Permission denied\)"):
        finetune(config(tiny, tmp_path / "out"))


def test_command_line_defaults_are_the_recipes():
    from qtune_companion.cli import _parser

    given = vars(_parser().parse_args(["finetune"]))
    given["train_on"] = tuple(given["train_on"].split("+"))
    fields = {f.name: f.default for f in dataclasses.fields(FinetuneConfig)}
    shared = given.keys() & fields.keys() - {"moves"}  # None there, the Count's eight here
    assert len(shared) > 12
    assert {k: given[k] for k in shared} == {k: fields[k] for k in shared}
