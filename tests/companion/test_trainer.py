import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from qtune_companion.recipes import finetune
from qtune_companion.trainer import newest_checkpoint


class Watch(TrainerCallback):
    """Keeps one weight of each step; can end the run with an error, as a power cut does."""

    def __init__(self, name, end=None):
        self.name, self.end, self.seen = name, end, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.get_submodule(self.name).lora_B.detach().clone())
        if state.global_step == self.end:
            raise RuntimeError("power cut")


def test_adapter_is_the_mean_over_the_last_steps(config, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    watch = Watch(name)
    result = finetune(config(tmp_path, average=0.25), callbacks=[watch])
    got = result.model.get_submodule(name).lora_B.detach()
    assert len(watch.seen) == 24
    torch.testing.assert_close(got, torch.stack(watch.seen[-6:]).mean(0))
    assert not torch.allclose(got, watch.seen[-1])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.model.{name}.lora_B.weight"], got)


def test_resumed_amid_the_averaging_equals_uninterrupted(config, tmp_path):
    finetune(config(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(config(tmp_path / "cut"), callbacks=[Watch("model.layers.0.mlp.up_proj", end=20)])
    assert newest_checkpoint(tmp_path / "cut" / "checkpoints").name == "checkpoint-18"
    finetune(config(tmp_path / "cut", resume=True))
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_is_whole_or_passed_over(tmp_path):
    files = (
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
    )
    for step in (2, 10, 30):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in files:
            (folder / name).touch()
        (folder / "trainer_state.json").write_text('{"global_step": 1, "max_steps": 9}')
    (tmp_path / "checkpoint-99-copy").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-30"
    for state in ("{}", '{"half', "[]"):
        (tmp_path / "checkpoint-30" / "trainer_state.json").write_text(state)
        assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "rng_state_0.pth").unlink()
    assert newest_checkpoint(tmp_path) is None
