"""The jury against torch.distributions, transformers' own loss, and scipy's bootstrap."""

import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from qtune_companion.evaluation.divergence import block_bootstrap, compare


@pytest.fixture(scope="module")
def pair():
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    first = LlamaForCausalLM(config).eval()
    second = LlamaForCausalLM(config).eval()
    for old, new in zip(first.parameters(), second.parameters(), strict=True):
        new.data.copy_(old.data + 0.01 * torch.randn_like(old))
    return first, second


@pytest.mark.parametrize("window", [8, 33, 64])
def test_kl_and_loss_agree_with_torch_and_transformers(pair, window):
    first, second = pair
    tokens = torch.randint(96, (64,), generator=torch.Generator().manual_seed(window))
    found = compare(first, second, tokens, window, window)
    kl, losses = [], []
    for piece in tokens.split(window):
        with torch.no_grad():
            p, q = (torch.distributions.Categorical(logits=m(piece[None]).logits[0, :-1]) for m in pair)
            kl.append(torch.distributions.kl_divergence(p, q))
            losses.append(second(piece[None], labels=piece[None]).loss * (len(piece) - 1))
    torch.testing.assert_close(found.kl, torch.cat(kl), rtol=1e-4, atol=1e-6)
    assert found.mean_kl > 0
    assert found.loss.sum().item() == pytest.approx(sum(losses).item(), rel=1e-5)


def test_single_draws_agree_with_scipy():
    x = torch.empty(500).exponential_(generator=torch.Generator().manual_seed(3)).double()
    theirs = stats.bootstrap((x.numpy(),), lambda v, axis: v.mean(axis=axis), n_resamples=4000, method="percentile",
                             rng=0).confidence_interval  # fmt: skip
    ours = block_bootstrap(x, block=1, samples=4000)
    # the ends of an interval from 4,000 samples move by about 3% of its width from seed to seed
    width = theirs.high - theirs.low
    assert ours[0] == pytest.approx(theirs.low, abs=0.12 * width)
    assert ours[1] == pytest.approx(theirs.high, abs=0.12 * width)
