import pytest
import torch

from qtune_companion.finetuning.lora import add_lora_
from qtune_companion.finetuning.quantized_linear import QuantizedLinear
from qtune_companion.quantization.codebook import NF4, CodebookGrid
from qtune_companion.surgery import model_bytes, quantize_


@pytest.mark.parametrize(
    ("scheme", "bits"), [("nf4", 4.5), ("nf4-dq", 4.13958), ("int8", 8.46667), ("int4", 5.25)]
)
def test_every_linear_layer_but_the_head(tiny_llm, scheme, bits):
    before = tiny_llm(torch.arange(6)[None]).logits
    report = quantize_(tiny_llm, scheme)
    assert len(report.layers) == 14
    assert isinstance(tiny_llm.lm_head, torch.nn.Linear)
    assert report.bits_per_weight == pytest.approx(bits, abs=1e-5)
    assert all(0 < layer.relative_error < 0.2 for layer in report.layers)
    after = tiny_llm(torch.arange(6)[None]).logits
    assert 0 < (after - before).norm() / before.norm() < 0.5
    assert "14 layers" in str(report)


def test_a_grid_is_a_scheme_too(tiny_llm):
    quantize_(tiny_llm, CodebookGrid(NF4, 32), skip=("lm_head", "q_proj"))
    kinds = {n.rpartition(".")[2]: type(m) for n, m in tiny_llm.named_modules() if hasattr(m, "in_features")}
    assert kinds["q_proj"] is torch.nn.Linear
    assert kinds["k_proj"] is QuantizedLinear


def test_the_ledger_counts_every_byte_once(tiny_llm):
    dense = model_bytes(tiny_llm)
    weights = sum(p.numel() for p in tiny_llm.parameters())  # tied weights count once
    buffers = sum(b.nbytes for b in tiny_llm.buffers())
    assert dense["trainable"] == dense["gradients"] == 4 * weights
    assert dense["adam"] == 8 * weights
    assert dense["frozen"] == buffers
    report = quantize_(tiny_llm, "nf4-dq")
    add_lora_(tiny_llm, 4, 8.0)
    ledger = model_bytes(tiny_llm)
    assert ledger["quantized"] == report.bytes_after
    assert ledger["trainable"] == 4 * sum(p.numel() for p in tiny_llm.parameters() if p.requires_grad)


def test_bad_input_leaves_the_model_whole(tiny_llm):
    with pytest.raises(ValueError, match="'nf5'; choose one of nf4, nf4-dq, int8, int4"):
        quantize_(tiny_llm, "nf5")
    with pytest.raises(ValueError, match="Embedding has no linear layers"):
        quantize_(torch.nn.Embedding(3, 3), "nf4")
    with pytest.raises(ValueError, match=r"weight of lm_head is also model\.embed_tokens's"):
        quantize_(tiny_llm, "nf4", skip=())
    with torch.no_grad():
        tiny_llm.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj holds NaN"):
        quantize_(tiny_llm, "nf4")
    assert not any(isinstance(m, QuantizedLinear) for m in tiny_llm.modules())


def test_what_stays_dense_lets_the_mapped_file_go(tiny_llm, tmp_path):
    tiny_llm.save_pretrained(tmp_path)
    model = type(tiny_llm).from_pretrained(tmp_path)
    before = {
        name: (p.detach().clone(), p.untyped_storage().data_ptr()) for name, p in model.named_parameters()
    }
    quantize_(model, "nf4")
    kept = dict(model.named_parameters())
    assert kept
    for name, parameter in kept.items():
        value, home = before[name]
        assert torch.equal(parameter, value)
        assert parameter.untyped_storage().data_ptr() != home
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_that_is_a_linear_layer_is_refused():
    with pytest.raises(ValueError, match="is a linear layer itself"):
        quantize_(torch.nn.Linear(64, 4), "nf4")


def test_biases_are_copied_too():
    model = torch.nn.Sequential(torch.nn.Linear(64, 4))
    bias = model[0].bias
    quantize_(model, "nf4")
    assert torch.equal(model[0].bias, bias)
    assert model[0].bias.data_ptr() != bias.data_ptr()
