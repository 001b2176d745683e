import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from qtune_companion.quantization.kv_cache import QuantizedCache, decode_blocks, encode_blocks

BITS = st.sampled_from([2, 3, 4, 8])


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ids():
    return torch.randint(96, (2, 100), generator=torch.Generator().manual_seed(1))


def fill(cache, x, y, chunk):
    for k, v in zip(x.split(chunk, 2), y.split(chunk, 2), strict=True):
        keys, values = cache.update(k, v, 0)
    return keys, values


# --- codes


@settings(deadline=None)
@given(BITS, st.sampled_from([-1, -2]), st.sampled_from([1, 2, 8]), st.integers(0, 99), st.floats(-3, 3))
def test_error_is_at_most_half_a_step_and_what_float16_rounds_off(bits, axis, block, seed, exponent):
    x = (draw(seed, 2, 3, 16, 24) + 0.7) * 10**exponent
    packed, step, low = encode_blocks(x, bits, block, axis)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, 16, 24 * bits // 8)
    back = decode_blocks(packed, step, low, bits)
    blocks = lambda t: t.unflatten(axis, (-1, block))  # noqa: E731
    ends = blocks(x).abs().amax(axis, keepdim=True) * 2**-10 + 2**-24 * 2**bits
    assert ((blocks(back) - blocks(x)).abs() <= step.float() * (0.5 + 2 ** (bits - 11)) + ends).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_survives_packing_and_lands_where_the_docstring_says(bits):
    codes = torch.randint(2**bits, (2, 2, 64, 24), generator=torch.Generator().manual_seed(0))
    codes[:, :, :2] = torch.tensor([0, 2**bits - 1])[:, None]  # both ends in each channel: the step is 1
    packed, step, low = encode_blocks(codes.float(), bits, 64, -2)
    assert torch.equal(step, torch.ones(2, 2, 1, 1, 24, dtype=torch.float16))
    assert torch.equal(decode_blocks(packed, step, low, bits), codes.float())
    if bits == 4:
        row = torch.tensor([0.0, 15, 1, 2, 3, 4, 5, 6]).view(1, 1, 1, 8)
        packed, step, low = encode_blocks(row, 4, 8, -1)
        assert packed.flatten().tolist() == [0xF0, 0x21, 0x43, 0x65]  # the first code in the low half
        assert step.item() == 1
        assert torch.equal(decode_blocks(packed, step, low, 4), row)


def test_constant_tiny_and_offset_blocks():
    for value in (0.0, 3.0, -1e-9, 60000.0):
        x = torch.full((1, 1, 8, 8), value)
        back = decode_blocks(*encode_blocks(x, 4, 8, -2), 4)
        assert torch.isfinite(back).all()
        assert torch.allclose(back, x, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_numbers_that_float16_cannot_hold_are_refused(bad):
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 3, 4] = bad
    with pytest.raises(ValueError, match="NaN, infinity or numbers beyond float16"):
        QuantizedCache(4, 8, 0).update(x, x, 0)
    assert QuantizedCache(None).update(x, x, 0)[0].isnan().any() == (bad != bad)


def test_bad_blocks_are_named():
    x = torch.zeros(1, 2, 12, 16)
    for bits, axis in ((5, -1), (0, -1), (4, 2), (4, 0)):
        with pytest.raises(
            ValueError, match=f"bits must be 2, 3, 4 or 8 and axis -1 or -2, got {bits} and {axis}"
        ):
            encode_blocks(x, bits, 4, axis)
    for bad, block, axis in ((x, 8, -2), (x, 32, -1), (x, 0, -1), (x[0], 4, -1), (x[..., :12], 4, -1)):
        with pytest.raises(ValueError, match=f"multiple of 8.* for blocks of {block} along axis {axis}"):
            encode_blocks(bad, 4, block, axis)


def test_no_graph_is_kept_and_gradients_flow_through_what_is_exact():
    x = draw(0, 1, 2, 24, 16).requires_grad_()
    cache = QuantizedCache(4, 8, 8, sink=0, rotate=True)
    with torch.inference_mode():  # the matrix is made here and used there
        QuantizedCache(4, 8, 8, rotate=True).update(x, x, 0)
    cache.update(x, x, 0)
    assert not any(t.requires_grad for t in (*cache.layers[0].stored, *encode_blocks(x, 4, 8, -1)))
    sum(t.sum() for t in cache.update(x[:, :, :1], x[:, :, :1], 0)).backward()
    assert (x.grad[:, :, 16:] == 2).all()
    assert (x.grad[:, :, 1:16] == 0).all()


# --- the cache alone


@settings(deadline=None)
@given(BITS, st.integers(1, 40), st.integers(0, 20), st.sampled_from([4, 8, (8, 4), (4, 16)]), st.booleans())
def test_chunks_do_not_matter_the_window_is_exact_and_lengths_add_up(bits, chunk, residual, block, rotate):
    k, v = draw(0, 2, 2, 70, 16), draw(1, 2, 2, 70, 16)
    cache, whole = (
        QuantizedCache(bits, block, residual, rotate=rotate),
        QuantizedCache(bits, block, residual, rotate=rotate),
    )
    fill(cache, k, v, chunk)
    whole.update(k, v, 0)
    assert cache.get_seq_length() == 70
    tokens = block if isinstance(block, int) else block[0]
    window = cache.layers[0].keys.shape[2]
    assert residual <= window < residual + tokens
    last = draw(2, 2, 2, 1, 16)
    for ours, theirs, exact in zip(
        cache.update(last, last, 0), whole.update(last, last, 0), (k, v), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours[:, :, -window - 1 : -1], exact[:, :, 70 - window :])
        assert torch.equal(ours[:, :, -1:], last)
        assert torch.equal(ours[:, :, :1], exact[:, :, :1])  # the sink
        assert not torch.isclose(ours[:, :, 1 : 70 - window], exact[:, :, 1 : 70 - window], rtol=1e-5).all()


@pytest.mark.parametrize("sink", [0, 1, 3, 8])
def test_the_sink_stays_exact_and_its_neighbor_does_not(sink):
    k, v = draw(0, 2, 2, 40, 16), draw(1, 2, 2, 40, 16)
    cache = QuantizedCache(2, 8, 0, sink)
    fill(cache, k, v, 5)
    cache.reorder_cache(torch.tensor([1, 0]))
    for ours, exact in zip(cache.update(k[:, :, :1], v[:, :, :1], 0), (k.flip(0), v.flip(0)), strict=True):
        assert torch.equal(ours[:, :, :sink], exact[:, :, :sink])
        assert not torch.isclose(ours[:, :, sink], exact[:, :, sink]).all()


def test_a_chunk_is_returned_as_it_came():
    k = draw(0, 1, 2, 64, 16)
    cache = QuantizedCache(2, 8, 0)
    assert torch.equal(cache.update(k, k, 0)[0], k)
    assert cache.layers[0].keys.shape[2] == 0


def test_stored_tokens_are_never_rounded_again():
    cache = QuantizedCache(4, 8, 8)
    k, v = draw(0, 1, 2, 200, 16), draw(1, 1, 2, 200, 16)
    first = [t[:, :, :48].clone() for t in cache.update(k[:, :, :64], v[:, :, :64], 0)]
    cache.update(k[:, :, 64:72], v[:, :, 64:72], 0)
    first = cache.update(k[:, :, 72:80], v[:, :, 72:80], 0)[0][:, :, :48]
    assert torch.equal(fill(cache, k[:, :, 80:], v[:, :, 80:], 8)[0][:, :, :48], first)


def test_keys_share_a_step_along_tokens_and_values_along_channels():
    tall = draw(0, 1, 1, 32, 16)
    tall[..., 5] += 100  # one tall channel
    error = {}
    for keys in ("channel", "token"):
        cache = QuantizedCache(4, (32, 16), 0, sink=0, keys=keys)
        cache.update(tall, tall, 0)
        back = cache.update(tall[:, :, :1], tall[:, :, :1], 0)
        error[keys] = [((t[:, :, :-1] - tall)[..., :5]).square().mean().sqrt().item() for t in back]
    assert error["channel"][0] < 0.1 < 0.8 < error["token"][0]
    assert error["channel"][1] == error["token"][1] == error["token"][0]


def test_rotation_spreads_a_tall_channel():
    tall = draw(0, 1, 1, 32, 16)
    tall[..., 5] += 100 * draw(1, 32)
    errors = []
    for rotate in (False, True):
        cache = QuantizedCache(4, 16, 0, keys="token", rotate=rotate)
        cache.update(tall, tall, 0)
        errors.append((cache.update(tall[:, :, :1], tall[:, :, :1], 0)[0][:, :, :-1] - tall).norm().item())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bytes_are_counted_and_nothing_hidden_stays_alive(dtype):
    cache = QuantizedCache(4, (128, 64), 128)
    x = draw(0, 1, 3, 1024, 64).to(dtype)
    cache.update(x, x, 0)
    numbers = 3 * 64
    stored = 2 * 896 * numbers // 2 + 4 * (896 // 128 * numbers + 896 * 3)  # codes; steps and minima
    assert cache.nbytes == stored + 2 * (128 + 1) * numbers * x.element_size()
    keys, _ = cache.update(x[:, :, :1], x[:, :, :1], 0)
    assert keys.dtype == dtype


def test_at_8k_tokens_of_16_bits_the_defaults_save_three_and_a_half():
    cache, x = QuantizedCache(4), torch.zeros(1, 1, 8192, 64, dtype=torch.float16)
    cache.update(x, x, 0)
    assert 2 * x.nbytes / cache.nbytes >= 3.5


# --- in a model


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_without_bits_it_is_the_dense_cache(tiny_llm, ids, chunk):
    dense, ours = DynamicCache(config=tiny_llm.config), QuantizedCache(None)
    with torch.no_grad():
        for piece in ids.split(chunk, 1):
            expected = tiny_llm(piece, past_key_values=dense).logits
            assert torch.equal(tiny_llm(piece, past_key_values=ours).logits, expected)
    assert ours.nbytes == sum(2 * layer.keys.nbytes for layer in dense.layers)


def test_more_bits_are_closer(tiny_llm, ids):
    def logits(cache):
        with torch.no_grad():
            return torch.cat([tiny_llm(p, past_key_values=cache).logits for p in ids.split(20, 1)], 1)

    exact = logits(QuantizedCache(None))
    errors = [(logits(QuantizedCache(bits, 8, 8)) - exact).norm().item() for bits in (8, 4, 3, 2)]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_with_eight_bits_says_what_the_dense_cache_says(tiny_llm, ids, how):
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **how}
    expected = tiny_llm.generate(ids, **options)
    cache = QuantizedCache(8, 8, 8)
    assert torch.equal(tiny_llm.generate(ids, past_key_values=cache, **options), expected)
    assert cache.layers[0].stored[0].shape[2] > 100


def test_generate_with_a_left_padded_batch(tiny_llm, ids):
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = tiny_llm.generate(ids, **options)
    assert torch.equal(tiny_llm.generate(ids, past_key_values=QuantizedCache(8, 8, 8), **options), expected)


def test_prompt_lookup_takes_back_what_it_guessed_wrong(tiny_llm, ids):
    """It calls crop after each guess."""
    options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 4}
    expected = tiny_llm.generate(ids[:1], **options)
    cache = QuantizedCache(8, 8, 0)
    assert torch.equal(tiny_llm.generate(ids[:1], past_key_values=cache, **options), expected)


@pytest.mark.parametrize("chunk", [1, 30])
def test_a_sliding_window_is_masked_as_in_the_dense_cache(ids, chunk):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    dense, ours = DynamicCache(config=config), QuantizedCache(None)
    with torch.no_grad():
        for piece in ids.split(chunk, 1):
            expected = model(piece, past_key_values=dense).logits
            torch.testing.assert_close(model(piece, past_key_values=ours).logits, expected)


def test_batch_operations_move_codes_and_window_together():
    cache = QuantizedCache(4, 8, 8)
    k = draw(0, 3, 2, 30, 16)
    cache.update(k, k, 0)
    one = draw(1, 1, 2, 1, 16)
    plain = copy.deepcopy(cache).update(one.expand(3, -1, -1, -1), one.expand(3, -1, -1, -1), 0)
    index = torch.tensor([2, 0, 0])
    for change, rows in (
        (lambda c: c.reorder_cache(index), index),
        (lambda c: c.batch_select_indices(index[:2]), index[:2]),
        (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        new = one.expand(len(rows), -1, -1, -1)
        for ours, before in zip(changed.update(new, new, 0), plain, strict=True):
            assert torch.equal(ours, before[rows])


@pytest.mark.parametrize("remove", [0, 1, 9, 12, 13, 40, 69, 70, 99])
def test_crop_forgets_the_last_tokens_and_no_others(remove):
    k, v = draw(0, 1, 2, 70, 16), draw(1, 1, 2, 70, 16)
    cache = QuantizedCache(4, 8, 5)
    cache.update(k, v, 0)
    before = copy.deepcopy(cache).update(k[:, :, :1], v[:, :, :1], 0)
    cache.crop(-remove)
    left = max(70 - remove, 0)
    assert cache.get_seq_length() == left
    kept = sum(t.untyped_storage().nbytes() for t in (cache.layers[0].keys, cache.layers[0].values))
    assert kept == 2 * cache.layers[0].keys.nbytes  # nothing hidden stays alive
    for after, old in zip(cache.update(k[:, :, :1], v[:, :, :1], 0), before, strict=True):
        assert torch.equal(after[:, :, :-1], old[:, :, :left])


def test_crop_forward_is_refused_and_reset_forgets_all():
    cache = QuantizedCache(4, 8, 0)
    cache.crop(-3)  # nothing there yet
    x = draw(0, 1, 2, 32, 16)
    cache.update(x, x, 0)
    with pytest.raises(ValueError, match="positive value"):
        cache.crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    y = draw(1, 2, 2, 9, 16)  # another batch size is welcome
    assert torch.equal(cache.update(y, y, 0)[0], y)


@pytest.mark.parametrize("forget", [lambda c: c.reset(), lambda c: c.crop(-40), lambda c: c.crop(-33)])
def test_the_sink_of_what_was_forgotten_is_forgotten(forget):
    x, y = draw(0, 1, 2, 40, 16), draw(1, 1, 2, 40, 16)
    cache = QuantizedCache(2, 8, 0, sink=8)
    cache.update(x, x, 0)
    forget(cache)
    kept = cache.get_seq_length()  # 7 of the old, or none
    cache.update(y, y, 0)
    keys, _ = cache.update(y[:, :, :1], y[:, :, :1], 0)
    assert torch.equal(keys[:, :, :8], torch.cat([x[:, :, :kept], y], 2)[:, :, :8])


def test_bad_input_is_named():
    for bits in (1, 5, 16, "4", 4.0):
        with pytest.raises(ValueError, match=f"bits must be 2, 3, 4, 8 or None, got {bits}"):
            QuantizedCache(bits)
    for block, residual, sink in (
        (0, 8, 0),
        (8, -1, 1),
        ((8, 8, 8), 8, 1),
        ((8, 0), 8, 1),
        (8, 8, -1),
        (8, 8, 9),
        (8.0, 8, 1),
        ([8, 4.0], 8, 1),
        (8, 0.5, 1),
        ("8", 8, 1),
        (8, 8, 0.5),
    ):
        with pytest.raises(ValueError, match=f"sink <= block size, got .* and {sink}"):
            QuantizedCache(4, block, residual, sink)
    with pytest.raises(ValueError, match="'channel' or 'token', got 'head'"):
        QuantizedCache(4, keys="head")
    for channels, block, rotate in ((12, 4, False), (24, 16, False), (24, 8, True)):
        x = torch.zeros(1, 1, 8, channels)
        with pytest.raises(ValueError, match=f"heads of {channels} channels do not fit"):
            QuantizedCache(4, block, 0, rotate=rotate).update(x, x, 0)
    x = torch.zeros(1, 1, 8, 12)
    QuantizedCache(None).update(x, x, 0)
    for k, v in ((x[0], x[0]), (x, x[:, :, :4]), (x, x.repeat(2, 1, 1, 1))):
        with pytest.raises(ValueError, match="must be .batch, heads, tokens, channels., got"):
            QuantizedCache(None).update(k, v, 0)


@pytest.mark.parametrize("bits", [None, 4])
def test_tokens_of_another_conversation_are_refused(bits):
    x = draw(0, 2, 2, 16, 16)
    cache = QuantizedCache(bits, 8, 0)
    cache.update(x, x, 0)
    for other in (x[:1], x[:, :1], x[..., :8]):
        for k, v in ((other, other), (x[: len(other), : other.shape[1]], other)):
            with pytest.raises(ValueError, match="do not continue .*: use a new cache, or reset"):
                cache.update(k, v, 0)
    assert cache.get_seq_length() == 16  # and nothing happened
    cache.reset()
    assert cache.update(x[:1], x[:1], 0)[0].shape[0] == 1
