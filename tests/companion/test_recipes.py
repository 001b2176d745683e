import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from qtune_companion.finetuning.lora import load_adapter_
from qtune_companion.models import load_model, load_tokenizer
from qtune_companion.recipes import finetune
from qtune_companion.trainer import newest_checkpoint


def test_trains_saves_and_peft_loads(config, tiny, tmp_path):
    result = finetune(config(tmp_path / "out"))
    assert len(result.losses) == 24
    assert result.losses[-1] < result.losses[0]
    assert 0 <= result.accuracy_after <= 1
    assert 4 < result.bits_per_weight < 5
    dense, ids = load_model(str(tiny / "model")), torch.arange(1000, 1020)[None]
    load_adapter_(dense, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    theirs = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(theirs(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-6)
    for sub in tmp_path.rglob("*"):
        assert sub.suffix != ".bin"


def test_killed_and_resumed_equals_uninterrupted(config, tiny, tmp_path):
    whole = tmp_path / "whole"
    finetune(config(whole))
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


def test_a_training_that_runs_away_saves_nothing(config, tmp_path):
    with pytest.raises(ValueError, match=r"ran away to NaN or inf; .* Lower lr \(1e\+30\)"):
        finetune(config(tmp_path, lr=1e30, max_steps=4))
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("max_length", [512, 60])
def test_speeches_longer_than_the_models_context_are_cut_with_a_warning(config, tmp_path, max_length):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    OPTForCausalLM(
        OPTConfig(vocab_size=49152, word_embed_proj_dim=32, max_position_embeddings=64, **sizes)
    ).save_pretrained(tmp_path / "opt")
    load_tokenizer().save_pretrained(tmp_path / "opt")
    room = min(max_length, 64)
    with pytest.warns(UserWarning, match=rf"prompts were cut from the left to {room} tokens") as seen:
        finetune(config(tmp_path / "out", model=str(tmp_path / "opt"), max_steps=2, max_length=max_length))
    assert any(f"cut from the left to {room - 1}; the completion is kept" in str(w.message) for w in seen)


def test_the_settings_arrive_where_they_work(config, tmp_path, monkeypatch):
    from qtune_companion import recipes

    seen = {}

    def add_lora(model, rank, alpha, dropout):
        seen.update(rank=rank, alpha=alpha, dropout=dropout)
        return load_lora(model, rank, alpha, dropout=dropout)

    def loss(*args, **kwargs):
        seen.update(kwargs)
        return real_loss(*args, **kwargs)

    load_lora, real_loss = recipes.add_lora_, recipes.completion_loss
    monkeypatch.setattr(recipes, "add_lora_", add_lora)
    monkeypatch.setattr(recipes, "completion_loss", loss)
    chosen = {"rank": 4, "alpha": 9.0, "dropout": 0.3, "prompt_weight": 0.7, "among": 0.2}
    finetune(config(tmp_path, max_steps=10, warmup=0.5, weight_decay=0.02, **chosen))
    assert {name: seen[name] for name in chosen} == chosen
    arguments = recipes.training_arguments(config(tmp_path, warmup=0.5, weight_decay=0.02), tmp_path, 10)
    assert (arguments.warmup_steps, arguments.weight_decay) == (5, 0.02)
