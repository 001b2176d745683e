"""LoRA against peft: forward, gradients, merge, and adapters on disk both ways."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qtune_companion.finetuning.lora import add_lora_, load_adapter_, merge_lora_, save_adapter

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )).eval()  # fmt: skip


def theirs_with_update(base):
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def test_their_adapter_loads_here_and_agrees(base, tmp_path):
    theirs = theirs_with_update(base)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    names = load_adapter_(ours, tmp_path)
    assert len(names) == 14
    a, b = ours(IDS, labels=IDS), theirs(IDS, labels=IDS)
    assert relative(a.logits, b.logits) <= 1e-5
    a.loss.backward()
    b.loss.backward()
    compared = 0
    for name in names:
        layer, other = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        for mine, their in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            assert relative(mine.grad, their["default"].weight.grad) <= 1e-5
            compared += 1
    assert compared == 28
    merge_lora_(ours)
    merged = theirs.merge_and_unload()
    assert relative(ours(IDS).logits, merged(IDS).logits) <= 1e-5


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["model.layers.1.mlp.up_proj"]])
def test_our_adapter_loads_there(base, tmp_path, targets):
    ours = copy.deepcopy(base)
    torch.manual_seed(2)
    for name in add_lora_(ours, 4, 8.0, targets):
        torch.nn.init.normal_(ours.get_submodule(name).lora_B, std=0.05)
    save_adapter(ours, tmp_path, task_type="CAUSAL_LM")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert relative(ours(IDS).logits, theirs(IDS).logits) <= 1e-5
    assert relative(ours(IDS).logits, base(IDS).logits) > 1e-3, "the adapter does nothing"


def test_rank_stabilized_adapters_survive_a_round_trip(base, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True
    )
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    load_adapter_(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", task_type="CAUSAL_LM")
    again, there = (
        copy.deepcopy(base),
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval(),
    )
    load_adapter_(again, tmp_path / "ours")
    for model in (ours, again, there):
        assert relative(model(IDS).logits, theirs(IDS).logits) <= 1e-5
