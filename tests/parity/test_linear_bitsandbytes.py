"""QuantizedLinear over NF4 against bitsandbytes' Linear4bit: forward and gradient of the input."""

import bitsandbytes as bnb
import pytest
import torch

from qtune_companion.finetuning.quantized_linear import QuantizedLinear
from qtune_companion.quantization.codebook import quantize_nf4


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (576, 1536)])
def test_forward_and_input_gradient(shape, double_quant, generator):
    out_features, in_features = shape
    w = torch.randn(shape, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    theirs = bnb.nn.Linear4bit(in_features, out_features, compute_dtype=torch.float32,
                               compress_statistics=double_quant, quant_type="nf4")  # fmt: skip
    theirs.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4",
                                      compress_statistics=double_quant)  # fmt: skip
    theirs.bias = torch.nn.Parameter(bias.clone())
    theirs = theirs.to("cpu")
    ours = QuantizedLinear(quantize_nf4(w, double_quant=double_quant), bias)
    x = torch.randn(3, 7, in_features, generator=generator)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(3, 7, out_features, generator=generator)
    y, z = ours(a), theirs(b)
    y.backward(grad)
    z.backward(grad)
    assert theirs.weight.dtype == torch.uint8, "the judge did not quantize"
    for got, want in ((y, z), (a.grad, b.grad)):
        assert ((got - want).abs().max() / want.abs().max()).item() <= 1e-5
