import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtune_companion.finetuning.lora import add_lora_
from qtune_companion.quantization.calibration import collect_absmax, collect_hessians, collect_inputs


class Choosy(nn.Module):
    """Two experts, of which the text reaches one, and a layer called twice, by keyword."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.twice = nn.Linear(4, 4)

    def forward(self, x):
        idle = self.experts[1](x[:0])  # an expert that no token chose
        return self.twice(input=self.twice(self.experts[0](x))) + idle.sum()


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(96, (2, 5 + i), generator=generator) for i in range(count)]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99), st.integers(1, 4), st.booleans())
def test_hessians_and_maxima_are_those_of_the_inputs(seed, count, bias):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3))
    text = [torch.randn(2, 3 + i, 6) for i in range(count)]
    inputs = collect_inputs(model, iter(text))
    assert torch.equal(inputs["0"], torch.cat([x.flatten(0, 1) for x in text]))
    hessians, absmax = collect_hessians(model, text), collect_absmax(model, text)
    for name, x in inputs.items():
        assert torch.allclose(hessians[name], x.T @ x / len(x), atol=1e-5)
        assert torch.equal(absmax[name], x.abs().amax(0))


def test_a_real_architecture_layers_that_share_an_input_and_a_tied_output(tiny_llm):
    text = batches()
    inputs, hessians = collect_inputs(tiny_llm, text), collect_hessians(tiny_llm, text)
    assert len(inputs) == 14  # seven a layer; lm_head is tied to the embedding and left alone
    assert "lm_head" not in inputs
    layer = "model.layers.1.self_attn."
    assert hessians[layer + "q_proj"].data_ptr() != hessians[layer + "k_proj"].data_ptr()
    for name, x in inputs.items():
        assert x.shape[0] == 2 * (5 + 6 + 7)
        assert hessians[name].dtype == torch.float32
        assert torch.allclose(hessians[name], x.T @ x / len(x), rtol=1e-3, atol=1e-5)
    only = collect_absmax(tiny_llm, text, names=layer + "o_proj")
    assert torch.equal(only[layer + "o_proj"], inputs[layer + "o_proj"].abs().amax(0))


def test_half_precision_inputs_give_float32_hessians():
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    x = torch.randn(3, 4).bfloat16()
    assert collect_inputs(model, [x])["0"].dtype == torch.bfloat16
    assert torch.allclose(collect_hessians(model, [x])["0"], x.float().T @ x.float() / 3)


def test_a_layer_called_twice_counts_both():
    x = torch.randn(7, 4)
    inputs = collect_inputs(Choosy(), [x], ["twice"])
    assert inputs["twice"].shape == (14, 4)


def test_the_model_is_left_as_it_was(tiny_llm):
    tiny_llm.train()
    collect_absmax(tiny_llm, batches(1))
    assert tiny_llm.training
    assert not any(m._forward_pre_hooks for m in tiny_llm.modules())
    model = Choosy()
    with pytest.raises(ValueError, match="never called"):
        collect_inputs(model, [torch.randn(2, 4)])
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("collect", [collect_inputs, collect_hessians, collect_absmax])
def test_bad_input_is_named(collect, tiny_llm):
    with pytest.raises(ValueError, match=r"never called during calibration: experts\.1\."):
        collect(Choosy(), [torch.randn(2, 4)])
    spent = iter(batches(1))
    list(spent)
    for empty in ([], spent, [torch.zeros(1, 0, dtype=torch.long)]):
        with pytest.raises(ValueError, match="no calibration text"):
            collect(tiny_llm, empty)
    with pytest.raises(ValueError, match="tied to model.embed_tokens and lm_head"):
        collect(tiny_llm, batches(1), ["lm_head"])
    with pytest.raises(ValueError, match="no layer 'nope'"):
        collect(tiny_llm, batches(1), ["nope"])
    for model, names in ((tiny_llm, []), (nn.Tanh(), None)):
        with pytest.raises(ValueError, match="no layers to watch"):
            collect(model, batches(1), names)
    tiny_llm.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"input of model\.layers\.0\.mlp\.down_proj holds NaN or infinity"):
        collect(tiny_llm, batches(1))
    assert not any(m._forward_pre_hooks for m in tiny_llm.modules())


def test_an_untied_output_layer_may_be_watched(tiny_llm):
    tiny_llm.lm_head.weight = nn.Parameter(tiny_llm.lm_head.weight.detach().clone())
    assert "lm_head" in collect_absmax(tiny_llm, batches(1))


def test_inputs_are_kept_as_they_were_when_the_layer_read_them():
    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x * 1
            y = self.first(x)
            return y + self.second(x.mul_(3))

    x = torch.randn(5, 4)
    inputs = collect_inputs(Reuses(), [x])
    assert torch.equal(inputs["first"], x)
    assert torch.equal(inputs["second"], 3 * x)
    hessians = collect_hessians(Reuses(), [x])
    assert torch.allclose(hessians["second"], 9 * hessians["first"], rtol=1e-4)


def test_layers_behind_adapters_are_calibrated(tiny_llm):
    plain = list(collect_absmax(tiny_llm, [torch.arange(8)[None]]))
    add_lora_(tiny_llm, 2, 4)
    behind = collect_absmax(tiny_llm, [torch.arange(8)[None]])
    assert {name.removesuffix(".base") for name in behind} == set(plain)


def test_every_module_keeps_its_mode():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.9), torch.nn.Linear(2, 2)).train()
    model[1].eval()
    seen = collect_absmax(model, [torch.ones(1, 2)])
    assert [m.training for m in model] == [True, False, True]
    model[1].train()
    assert torch.equal(collect_absmax(model, [torch.ones(1, 2)])["2"], seen["2"])  # no dropout while it runs
