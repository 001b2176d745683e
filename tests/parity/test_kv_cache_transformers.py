"""The quantized cache against transformers: the dense cache to the bit, its quanto and HQQ backends by what
make_kv_cache_fixture.py keeps of them, its policy on our codes; and against
the rounding and the split into a grouped and a residual part that section 3 of KIVI defines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.cache_utils import QuantizedCache as LibraryCache

from qtune_companion.quantization.kv_cache import QuantizedCache, decode_blocks, encode_blocks

KEPT = load_file(Path(__file__).with_name("fixtures") / "kv_cache_transformers.safetensors")


def stored_and_read(cache):
    """What a cache gives to attention for the fixture's 64 tokens, after one more."""
    for piece in (slice(64), slice(64, 65)):
        found = cache.update(KEPT["keys"][..., piece, :], KEPT["values"][..., piece, :], 0)
    return found


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids(generator):
    return torch.randint(96, (2, 192), generator=generator)


class OnOurCodes(QuantizedLayer):
    def _quantize(self, tensor, axis):
        return encode_blocks(tensor, self.nbits, self.q_group_size, -1)

    def _dequantize(self, quantized):
        return decode_blocks(*quantized, self.nbits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_without_bits_generate_is_that_of_the_dense_cache(model, ids, options):
    said = []
    for cache in (DynamicCache(), QuantizedCache(None), None):
        torch.manual_seed(1)
        options = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False, **options}
        said.append(model.generate(ids, past_key_values=cache, **options))
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])


def test_the_layers_answer_what_transformers_asks_of_its_own(model, ids):
    ours, dense = QuantizedCache(4, 64, 64), DynamicCache()
    with torch.no_grad():
        for cache in (ours, dense):
            model(ids, past_key_values=cache)
    assert ours.get_seq_length() == dense.get_seq_length() == 192
    assert ours.get_mask_sizes(5, 0) == dense.get_mask_sizes(5, 0)
    assert ours.get_max_length() == dense.get_max_length()
    for name in ("is_sliding", "is_compileable", "is_croppable", "is_initialized"):
        assert getattr(ours, name) == getattr(dense, name), name


def test_one_prompt_and_one_chunk_as_transformers_own_integer_layer(model, ids):
    """Up to the first flush, its policy is ours without a window and with keys per token."""
    ours = QuantizedCache(4, 64, 0, sink=0, keys="token")
    theirs = Cache(layer_class_to_replicate=OnOurCodes)
    with torch.no_grad():
        for cache in (ours, theirs):
            model(ids, past_key_values=cache)
        logits = [model(ids[:, :64], past_key_values=cache).logits for cache in (ours, theirs)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("keys", ["channel", "token"])
def test_attention_gets_what_quanto_gives_it(bits, keys):
    """Both put a block's codes on equal steps from its minimum. Ours are float16: near ties may fall otherwise."""
    ours = stored_and_read(QuantizedCache(bits, 16, 0, sink=0, keys=keys))
    for found, kind in zip(ours, ("keys", "values"), strict=True):
        exact, theirs = KEPT[kind], KEPT[f"quanto{bits}_{keys}_{kind}"]
        same = (found - theirs).abs() <= 2**-11 * 1.5 * exact.abs().max()  # low, and up to 15 steps
        assert same.float().mean() > 0.995  # 0.998 to 1 when this was written
        assert (found - exact).norm() == pytest.approx((theirs - exact).norm().item(), rel=1e-3)
    other = KEPT[f"quanto{bits}_{'token' if keys == 'channel' else 'channel'}_keys"]
    assert (ours[0] - other).norm() > 0.2 * (ours[0] - KEPT["keys"]).norm()  # the layouts are not alike


def test_hqq_optimizes_what_we_take_from_the_ends():
    ours = stored_and_read(QuantizedCache(4, 16, 0, sink=0, keys="token"))
    for found, kind in zip(ours, ("keys", "values"), strict=True):
        error = [(x - KEPT[kind]).norm().item() for x in (found, KEPT[f"hqq4_token_{kind}"])]
        assert error[1] < error[0] < 1.3 * error[1]


@pytest.mark.parametrize("axis", [-1, -2])
def test_rounding_as_kivi_defines_it(axis, generator):
    """Q(X) = round((X - z) / s) with z = min X and s = (max X - min X) / (2^B - 1), in a loop over the blocks."""
    x = (3 * torch.randn(1, 2, 32, 16, generator=generator)).half()
    along = x.double().movedim(axis, -1)
    rounded = []
    for run in along.reshape(-1, 8):
        z, s = run.min(), (run.max() - run.min()) / (2**3 - 1)
        rounded.append(torch.round((run - z) / s) * s + z)
    expected = torch.stack(rounded).view(along.shape).movedim(-1, axis)
    found = decode_blocks(*encode_blocks(x, 3, 8, axis), 3)
    same = (found - expected).abs() < 2**-10 * x.abs().max()
    assert same.float().mean() > 0.995


@pytest.mark.parametrize("length", [31, 32, 33, 64, 90])
def test_keys_split_as_kivi_splits_them(length, generator):
    """Its keys hold l mod R tokens back, R being the residual length: our window with residual=0 and blocks of R."""
    x = torch.randn(1, 2, length, 16, generator=generator)
    cache = QuantizedCache(2, 32, 0, sink=0)
    cache.update(x, x, 0)
    keys, _ = cache.update(x[:, :, :1], x[:, :, :1], 0)
    grouped = length - length % 32
    assert torch.equal(keys[:, :, grouped:length], x[:, :, grouped:])
    for block in range(0, grouped, 32):
        here = keys[:, :, block : block + 32]
        assert all(len(here[0, h, :, c].unique()) <= 4 for h in range(2) for c in range(16))


def test_fp8_is_coarser_than_eight_bits_in_blocks(model, ids):
    caches = QuantizedCache(None), QuantizedCache(8, 64, 0, sink=0), LibraryCache("fp8", model.config)
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
        dense, ours, fp8 = (model(ids[:, :32], past_key_values=cache).logits for cache in caches)
    assert (ours - dense).norm() < 0.5 * (fp8 - dense).norm()
