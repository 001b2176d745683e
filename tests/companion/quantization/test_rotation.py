import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qtune_companion.quantization.rotation import HadamardTransform, hadamard, rotate_

IDS = torch.arange(20).view(2, 10)
SIZES = {
    "vocab_size": 40, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip


def tiny(config=LlamaConfig, kind=LlamaForCausalLM, **options):
    """A small model whose norms, biases and embedding all matter."""
    torch.manual_seed(0)
    model = kind(config(**SIZES, **options)).eval()
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(p, mean=0.8, std=0.3)
        elif "embed" in name:
            nn.init.normal_(p)
        else:
            nn.init.normal_(p, std=0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 64, 144, 240, 576, 1536])
def test_rows_are_orthogonal_and_entries_are_signs(n):
    h = hadamard(n)
    assert h.shape == (n, n)
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, n * torch.eye(n))  # sums of up to 1536 signs are exact in float32


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([1, 2, 8, 12, 24, 48, 144]), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 99)
)
def test_transform_is_the_matrix_and_keeps_lengths(n, batch, seed):
    x = torch.randn(*batch, n, generator=torch.Generator().manual_seed(seed))
    y = HadamardTransform(n)(x)
    assert y.shape == x.shape
    assert torch.allclose(y, x @ hadamard(n) / n**0.5, atol=1e-5)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)


def test_transform_keeps_the_dtype_and_has_a_gradient():
    x = torch.randn(3, 24, requires_grad=True)
    with torch.inference_mode():
        HadamardTransform(24)(x)
    y = HadamardTransform(24)(x)
    (y * torch.arange(24.0)).sum().backward()
    assert torch.allclose(x.grad[0], hadamard(24) @ torch.arange(24.0) / 24**0.5, atol=1e-5)
    assert HadamardTransform(24)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("n", [0, -4, 3, 6, 28, 92])
def test_orders_without_a_construction_are_named(n):
    with pytest.raises(ValueError, match=f"order {n} here"):
        hadamard(n)
    with pytest.raises(ValueError, match=f"order {n} here"):
        HadamardTransform(n)


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("options", [
    {"tie_word_embeddings": True}, {}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 6},
])  # fmt: skip
def test_a_rotated_model_computes_the_same(online, options):
    model = tiny(**{k: v for k, v in options.items() if k not in SIZES})
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    q = rotate_(model, online)
    after = logits(model)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert torch.allclose(q @ q.T, torch.eye(48).double(), atol=1e-6)
    assert not torch.allclose(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    assert all((n.weight == 1).all() for name, n in model.named_modules() if name.endswith("norm"))


def test_the_stream_and_every_input_are_turned():
    model = tiny()
    turned = copy.deepcopy(model)
    q = rotate_(turned, online=False).float()
    seen = []
    for one in (model, turned):
        layer = one.model.layers[1]
        inputs = {}
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            keep = lambda m, a, name=name, inputs=inputs: inputs.__setitem__(name, a[0])  # noqa: E731
            layer.get_submodule(name).register_forward_pre_hook(keep)
        layer.register_forward_pre_hook(lambda m, a, inputs=inputs: inputs.__setitem__("stream", a[0]))
        logits(one)
        seen.append(inputs)
    plain, after = seen
    assert torch.allclose(after["stream"], plain["stream"] @ q, atol=1e-4)
    heads = plain["self_attn.o_proj"].unflatten(-1, (6, 8)) @ hadamard(8) / 8**0.5
    assert torch.allclose(after["self_attn.o_proj"], heads.flatten(-2), atol=1e-4)
    assert torch.allclose(after["mlp.down_proj"], plain["mlp.down_proj"], atol=1e-4)


def test_norms_on_queries_and_keys_are_left_alone():
    model = tiny(Qwen3Config, Qwen3ForCausalLM)
    before = logits(model)
    rotate_(model)
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()


def test_any_orthogonal_q_will_do_and_gradients_flow():
    model = tiny()
    before = logits(model)
    q = torch.linalg.qr(torch.randn(48, 48))[0]
    assert torch.equal(rotate_(model, q=q), q.double())
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_cannot_be_rotated_is_named_and_left_unchanged():
    layered = tiny()
    layered.model.layers[1].input_layernorm = nn.LayerNorm(48)
    cases = [
        (layered, {}, "layers.1.input_layernorm"),
        (tiny(Gemma2Config, Gemma2ForCausalLM), {}, "input_layernorm|norm"),
        (tiny(), {"q": torch.ones(48, 48)}, "must be orthogonal"),
        (tiny(), {"q": torch.eye(24)}, r"\(24, 24\).*\(48, 48\)"),
    ]
    extra = tiny()
    extra.model.layers[0].post_feedforward_layernorm = copy.deepcopy(extra.model.norm)
    cases.append((extra, {}, "post_feedforward_layernorm"))
    for model, options, words in cases:
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=words):
            rotate_(model, **options)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_half_precision_does_not_overflow():
    turned = HadamardTransform(1536)(torch.full((1536,), 60.0, dtype=torch.float16))
    assert torch.isfinite(turned).all()


def test_other_layers_and_a_second_turn_are_refused_whole(tiny_llm):
    before = {k: v.clone() for k, v in tiny_llm.state_dict().items()}
    attention, tiny_llm.model.layers[1].self_attn = tiny_llm.model.layers[1].self_attn, torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layer 1 has no linear layer self_attn\.q_proj"):
        rotate_(tiny_llm)
    tiny_llm.model.layers[1].self_attn = attention
    assert all(torch.equal(v, before[k]) for k, v in tiny_llm.state_dict().items())
    rotate_(tiny_llm)
    with pytest.raises(ValueError, match="rotated already"):
        rotate_(tiny_llm)
