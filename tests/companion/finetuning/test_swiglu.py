"""The lean SwiGLU: same numbers, same gradients, fewer bytes kept."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtune_companion.finetuning.lora import add_lora_
from qtune_companion.finetuning.swiglu import GatedMLP, _SwiGLU, lean_swiglu_
from qtune_companion.surgery import quantize_


def tiny(act="silu"):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, hidden_act=act,
    ))  # fmt: skip


def kept(work):
    """Bytes that autograd keeps, each storage once."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = work()
    return result, sum(seen.values())


def test_gradients_agree_with_finite_differences():
    inputs = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(_SwiGLU.apply, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_values_and_gradients_as_two_operations(dtype):
    gate, up = (torch.randn(7, 33).to(dtype).requires_grad_() for _ in range(2))
    out, expected = _SwiGLU.apply(gate, up), nn.functional.silu(gate) * up
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    grad = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(out, (gate, up), grad),
        torch.autograd.grad(expected, (gate, up), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)  # fmt: skip


def test_a_quantized_model_with_lora_computes_the_same_and_keeps_less():
    models = []
    for lean in (False, True):
        model = tiny()
        quantize_(model, "nf4")
        if lean:
            assert lean_swiglu_(model) == [f"model.layers.{i}.mlp" for i in range(2)]
        add_lora_(model, rank=2, alpha=4)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
        models.append(model)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    (loss, plain), (lean_loss, lean) = (kept(lambda m=m: m(ids, labels=ids).loss) for m in models)
    torch.testing.assert_close(loss, lean_loss, rtol=1e-6, atol=1e-6)
    assert plain - lean == 2 * ids.numel() * 128 * 4  # one tensor of (tokens, inner) a layer
    grads = [torch.autograd.grad(value, [p for p in m.parameters() if p.requires_grad])
             for value, m in ((loss, models[0]), (lean_loss, models[1]))]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    names = [{n for n, _ in m.named_parameters()} for m in models]
    assert names[0] == names[1]


def test_another_nonlinearity_is_left_alone():
    model = tiny("gelu")
    before = [type(m) for m in model.modules()]
    assert lean_swiglu_(model) == []
    assert [type(m) for m in model.modules()] == before
    assert lean_swiglu_(nn.Sequential(nn.Linear(3, 3))) == []


def test_the_mode_is_kept():
    model = tiny().eval()
    lean_swiglu_(model)
    assert not any(m.training for m in model.modules())
    assert isinstance(model.model.layers[0].mlp, GatedMLP)
