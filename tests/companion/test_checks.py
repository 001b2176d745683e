import pytest

from qtune_companion.recipes import finetune


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"prompt_weight": -0.1}, "prompt_weight must be 0 or more, got -0.1"),
        ({"prompt_weight": float("inf")}, "prompt_weight must be 0 or more, got inf"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or more, got nan"),
        ({"average": 1.5}, "average must be a share, 0 to 1, got 1.5"),
        ({"warmup": 2.0}, "warmup must be a share, 0 to 1, got 2.0"),
        ({"alpha": float("nan")}, "alpha must be positive, got nan"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, "seed must be 0 to 4294967295, got -1"),
        ({"lr": float("inf")}, "lr must be positive, got inf"),
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
        ({"moves": ("spy",)}, "moves must be two or more, none of them empty, got 'spy'"),
        ({"moves": ("spy", "", "rest")}, "none of them empty, got 'spy, , rest'"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 for all epochs, got 0"),
        ({"scheme": None, "compute": "bf16"}, "compute bf16 needs a quantized base"),
        ({"rank": 33}, "rank must be at most 32, the width of"),
        ({"alpha": 1e308}, "alpha must be at most 1,000,000"),
        ({"model": "./nothere"}, "there is no folder"),
    ],
)
def test_bad_values_are_named(config, tmp_path, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        finetune(config(tmp_path / "out", **changes))


def test_an_output_that_cannot_be_written_is_named(config, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(ValueError, match=r"is not writable \(Permission denied\)"):
        finetune(config(tmp_path / "out"))


def test_a_finished_run_is_called_finished(config, tmp_path):
    finetune(config(tmp_path, max_steps=3))
    with pytest.raises(ValueError, match=r"holds a finished run \(checkpoint-3\): name another folder"):
        finetune(config(tmp_path, max_steps=3))


def test_resuming_with_other_settings_is_refused(config, tmp_path):
    finetune(config(tmp_path, max_steps=3, lr=1e-3))
    with pytest.raises(ValueError, match=r"cannot resume .*: lr was 0\.001, now 0\.1"):
        finetune(config(tmp_path, resume=True, lr=0.1))


def test_an_adapter_is_not_written_over(config, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match="holds an adapter: name another folder"):
        finetune(config(tmp_path, max_steps=3))
    with pytest.raises(ValueError, match="output is empty"):
        finetune(config(""))


def test_a_refused_model_leaves_the_settings_of_another_run(config, tmp_path):
    (tmp_path / "run.json").write_text("precious")
    with pytest.raises(ValueError, match="unknown model"):
        finetune(config(tmp_path, model="nothing"))
    assert (tmp_path / "run.json").read_text() == "precious"
    finetune(config(tmp_path / "whole", max_steps=3))
    (tmp_path / "whole" / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"cannot resume .*run\.json is broken"):
        finetune(config(tmp_path / "whole", resume=True))


def test_resuming_with_other_data_is_refused(config, tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes((tiny / "data.jsonl").read_bytes())
    finetune(config(tmp_path / "out", data=str(data), max_steps=3))
    data.write_bytes(data.read_bytes().replace(b"attack", b"spy"))
    with pytest.raises(ValueError, match="cannot resume .*: data_sha256 was"):
        finetune(config(tmp_path / "out", data=str(data), resume=True))
