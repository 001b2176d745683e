import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtune_companion.finetuning.lora import LoRALinear, add_lora_, load_adapter_, merge_lora_, save_adapter
from qtune_companion.surgery import quantize_

IDS = torch.arange(12).view(2, 6)


def trained(model, rank=4, **kwargs):
    """A model with LoRA whose update is not zero."""
    names = add_lora_(model, rank, 8.0, **kwargs)
    torch.manual_seed(1)
    for name in names:
        torch.nn.init.normal_(model.get_submodule(name).lora_B, std=0.05)
    return names


def test_starts_at_the_base_and_only_the_adapter_trains(tiny_llm):
    before = tiny_llm(IDS).logits
    names = add_lora_(tiny_llm, 4, 8.0)
    assert len(names) == 14  # seven linear layers in each of two blocks; not the tied output embedding
    assert torch.equal(tiny_llm(IDS).logits, before)
    tiny_llm(IDS).logits.sum().backward()
    trainable = {n for n, p in tiny_llm.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{k}" for n in names for k in "AB"}
    assert all(p.grad is None for p in tiny_llm.parameters() if not p.requires_grad)


@pytest.mark.parametrize("scheme", [None, "nf4-dq", "int8"])
def test_merging_keeps_the_function(tiny_llm, scheme):
    if scheme:
        quantize_(tiny_llm, scheme)
    trained(tiny_llm)
    before = tiny_llm(IDS).logits
    assert merge_lora_(tiny_llm) == 14
    torch.testing.assert_close(tiny_llm(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, LoRALinear) for m in tiny_llm.modules())


def test_save_and_load_round_trip(tiny_llm, tmp_path):
    import copy

    fresh = copy.deepcopy(tiny_llm)
    trained(tiny_llm)
    save_adapter(tiny_llm, tmp_path / "a", base_model="tiny", task_type="CAUSAL_LM")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, "tiny")
    load_adapter_(fresh, tmp_path / "a")
    assert torch.equal(fresh(IDS).logits, tiny_llm(IDS).logits)
    load_adapter_(fresh, tmp_path / "a")  # again, into the layers that are there


@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_dropout_is_off_in_a_model_in_eval_mode(tiny_llm, tmp_path, scheme):
    import copy

    if scheme:
        quantize_(tiny_llm, scheme)
    fresh = copy.deepcopy(tiny_llm)
    trained(tiny_llm, dropout=0.5)
    assert torch.equal(tiny_llm(IDS).logits, tiny_llm(IDS).logits)
    save_adapter(tiny_llm, tmp_path)
    load_adapter_(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, tiny_llm(IDS).logits)
    assert not torch.equal(fresh.train()(IDS).logits, fresh(IDS).logits)


def test_partial_targets_are_named_exactly(tiny_llm, tmp_path):
    names = trained(tiny_llm, targets=["model.layers.0.self_attn.q_proj", "v_proj"])
    assert len(names) == 3
    save_adapter(tiny_llm, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_an_adapter_for_another_model_is_refused(tiny_llm, tmp_path):
    trained(tiny_llm)
    save_adapter(tiny_llm, tmp_path)
    with pytest.raises(ValueError, match=r"another model: 14 layers are missing"):
        load_adapter_(torch.nn.Sequential(torch.nn.Linear(3, 3)), tmp_path)
    other = type(tiny_llm)(type(tiny_llm.config)(**{**tiny_llm.config.to_dict(), "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"another model or rank: .* needs"):
        load_adapter_(other, tmp_path)
    assert not any(isinstance(m, LoRALinear) for m in other.modules())


@pytest.mark.parametrize("rank", [1, 8])
def test_an_adapter_of_another_rank_is_refused(tiny_llm, tmp_path, rank):
    import copy

    other = copy.deepcopy(tiny_llm)
    trained(tiny_llm, rank)
    save_adapter(tiny_llm, tmp_path)
    add_lora_(other, 4, 8.0)
    with pytest.raises(
        ValueError, match=rf"another model or rank: .* lora_A is \({rank}, 96\), needs \(4, 96\)"
    ):
        load_adapter_(other, tmp_path)


def test_an_adapter_that_fits_but_names_another_base_is_warned_about(tiny_llm, tmp_path):
    import copy

    tiny_llm.config.name_or_path = "count"
    fresh, other = copy.deepcopy(tiny_llm), copy.deepcopy(tiny_llm)
    trained(tiny_llm)
    save_adapter(tiny_llm, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter_(fresh, tmp_path)
    other.config.name_or_path = "countess"
    with pytest.warns(UserWarning, match="was made for count, and this model is countess"):
        load_adapter_(other, tmp_path)


def test_broken_and_foreign_adapters_are_refused(tiny_llm, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_adapter_(tiny_llm, tmp_path)
    trained(tiny_llm)
    save_adapter(tiny_llm, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        load_adapter_(tiny_llm, tmp_path)
    for text in ('{"r": 4', json.dumps({k: v for k, v in config.items() if k != "r"})):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json is broken"):
            load_adapter_(tiny_llm, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in tensors if "lora_B" in k)
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lora_B is None, needs"):
        load_adapter_(tiny_llm, tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="broken"):
        load_adapter_(tiny_llm, tmp_path)


def test_a_failed_save_leaves_the_old_adapter_whole(tiny_llm, tmp_path, monkeypatch):
    trained(tiny_llm)
    save_adapter(tiny_llm, tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")

    def fail(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("qtune_companion.finetuning.lora.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(tiny_llm, tmp_path)
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_input_is_named(tiny_llm, tmp_path):
    with pytest.raises(ValueError, match="got 0"):
        LoRALinear(torch.nn.Linear(2, 2), 0, 1.0)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        LoRALinear(torch.nn.Linear(2, 2), 1, 1.0, dropout=1.5)
    with pytest.raises(TypeError, match="ReLU"):
        LoRALinear(torch.nn.ReLU(), 1, 1.0)
    with pytest.raises(ValueError, match="nothing_here"):
        add_lora_(tiny_llm, 2, 2.0, targets=["nothing_here"])
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(tiny_llm, tmp_path)
    add_lora_(tiny_llm, 2, 2.0)
    with pytest.raises(ValueError, match="already"):
        add_lora_(tiny_llm, 2, 2.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_adapter(tiny_llm, tmp_path / "file")


def test_a_merged_model_that_was_cast_still_runs_and_keeps_its_biases():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
    quantize_(model, "nf4")
    trained(model)
    x = torch.randn(3, 64)
    before = model(x)
    model.bfloat16()
    merge_lora_(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(x.bfloat16()).float(), before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("alora_invocation_tokens", [9]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("bias", "all"),
        ("peft_type", "IA3"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tiny_llm, tmp_path, key, value):
    import copy

    fresh = copy.deepcopy(tiny_llm)
    trained(tiny_llm)
    save_adapter(tiny_llm, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match="plain LoRA"):
        load_adapter_(fresh, tmp_path)
    assert not any(isinstance(m, LoRALinear) for m in fresh.modules())


def test_foreign_tensors_and_partial_adapters_are_refused(tiny_llm, tmp_path):
    import copy

    whole, part = copy.deepcopy(tiny_llm), copy.deepcopy(tiny_llm)
    trained(whole)
    trained(part, targets=["q_proj"])
    save_adapter(part, tmp_path)
    with pytest.raises(ValueError, match="has 2 of the 14 layers that carry LoRA here"):
        load_adapter_(whole, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.q_proj.lora_magnitude_vector": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="holds base_model.model.q_proj.lora_magnitude_vector"):
        load_adapter_(tiny_llm, tmp_path)
