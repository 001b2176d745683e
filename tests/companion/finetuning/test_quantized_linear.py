import pytest
import torch

from qtune_companion.finetuning.quantized_linear import QuantizedLinear
from qtune_companion.quantization.affine import AffineGrid
from qtune_companion.quantization.codebook import quantize_nf4

KINDS = {
    "nf4": lambda w: quantize_nf4(w),
    "nf4-dq": lambda w: quantize_nf4(w, double_quant=True),
    "int8": lambda w: AffineGrid(8, (1, -1), symmetric=True).encode(w),
    "int4": lambda w: AffineGrid(4, (1, 32)).encode(w),
}


@pytest.fixture(params=KINDS)
def layer(request):
    torch.manual_seed(0)
    return QuantizedLinear(KINDS[request.param](torch.randn(24, 40)), torch.randn(24))


def test_forward_and_gradient_equal_the_dense_layers(layer):
    x = torch.randn(3, 5, 40, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    dense = torch.nn.functional.linear(z, layer.weight.dequantize(), layer.bias)
    y = layer(x)
    assert torch.equal(y, dense)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense.backward(grad)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-6, atol=1e-6)


def test_no_parameters_and_no_dense_weight_kept(layer):
    assert not list(layer.parameters())
    x = torch.randn(2, 40, requires_grad=True)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        layer(x)
    assert not any(t.numel() == 24 * 40 and t.is_floating_point() for t in stored)


def test_bf16_compute_keeps_the_inputs_dtype(layer):
    fast = QuantizedLinear(layer.weight, layer.bias, torch.bfloat16)
    x = torch.randn(4, 40)
    assert fast(x).dtype == torch.float32
    assert (fast(x) - layer(x)).abs().max() < 0.05 * layer(x).abs().max()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_cast_of_the_model_leaves_codes_and_scales_alone(layer):
    before = layer.weight.dequantize(torch.float32)
    assert torch.equal(layer.bfloat16().weight.dequantize(torch.float32), before)


def test_state_dict_round_trip(layer):
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(2, 40)
    y = layer(x)
    for buffer in layer.buffers():
        buffer.zero_()
    layer.load_state_dict(state)
    assert torch.equal(layer(x), y)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="got Tensor"):
        QuantizedLinear(torch.randn(3, 3))
    with pytest.raises(ValueError, match="got \\(5,\\)"):
        QuantizedLinear(quantize_nf4(torch.ones(5)))
    with pytest.raises(ValueError, match="does not fit 4 outputs"):
        QuantizedLinear(quantize_nf4(torch.ones(4, 4)), torch.ones(3))


def bf16_layer(kind, shape=(32, 64)):
    torch.manual_seed(1)
    return QuantizedLinear(KINDS[kind](torch.randn(shape)), compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bf16_gradient_is_a_dense_bf16_layers(kind):
    layer = bf16_layer(kind)
    dense = layer.weight.dequantize(torch.bfloat16)
    ours = torch.randn(5, 64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    along = torch.randn(5, 32)
    layer(ours).backward(along)
    torch.nn.functional.linear(theirs.bfloat16(), dense).float().backward(along)
    assert ours.grad.abs().max() > 0
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_gives_the_same_result(kind):
    layer = bf16_layer(kind)
    layer.fused_rows = 0
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(5, 64)
    assert torch.equal(compiled(x), layer(x))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for run, given in zip((compiled, layer), inputs, strict=True):
        run(given).square().sum().backward()
    assert inputs[0].grad.abs().max() > 0
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_gives_the_same_result(kind):
    layer = bf16_layer(kind)
    x = torch.randn(2, 3, 64)
    decode = layer(x)
    training = layer(x.clone().requires_grad_()).detach()
    layer.fused_rows = 0
    prefill = layer(x)
    assert torch.equal(prefill, training)
    assert ((decode - prefill).norm() / prefill.norm()).item() < 0.01  # two roundings to bf16


def test_the_path_follows_rows_and_gradient():
    layer = bf16_layer("int4")
    one, many = torch.randn(1, 64), torch.randn(layer.fused_rows + 1, 64)
    assert layer.fuses(one)
    assert not layer.fuses(many)
    assert layer.fuses(many[:-1])
    assert not layer.fuses(one.requires_grad_())
    with torch.no_grad():
        assert layer.fuses(one)
    assert not bf16_layer("nf4").fuses(one.detach())  # no kernel of its own


def test_a_kernel_is_not_used_on_overwritten_codes():
    layer = bf16_layer("int4")
    other = QuantizedLinear(KINDS["int4"](torch.randn(32, 64)), compute_dtype=torch.bfloat16)
    x = torch.randn(1, 64)
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("kind", KINDS)
def test_any_device_gives_the_cpus_result(kind, device):
    layer = bf16_layer(kind)
    x = torch.randn(5, 64)
    want = x.bfloat16().float() @ layer.weight.dequantize(torch.float32).T
    moved = layer.to(device)
    assert ((moved(x.to(device)).cpu() - want).norm() / want.norm()).item() < 0.01


def test_the_inputs_gradient_is_right_where_a_frozen_layer_comes_first():
    layer = bf16_layer("int4")
    adapter = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(2, 64)  # needs no gradient: the frozen layer may fuse, the adapter still learns
    (layer(x) + adapter(x)).sum().backward()
    assert adapter.weight.grad is not None
