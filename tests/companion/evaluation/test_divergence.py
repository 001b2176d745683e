import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.evaluation.divergence import block_bootstrap, compare, kl_divergence, log_probs
from qtune_companion.evaluation.perplexity import token_losses


class Table(torch.nn.Module):
    """The logits of the next token are a row of a table, whatever came before; remembers the windows it saw."""

    def __init__(self, table):
        super().__init__()
        self.table, self.seen = torch.nn.Parameter(table), []

    def forward(self, input_ids):
        self.seen.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.table[input_ids])


def tables(seed, n=7):
    generator = torch.Generator().manual_seed(seed)
    return Table(torch.randn(n, n, generator=generator)), Table(torch.randn(n, n, generator=generator))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.integers(2, 40), st.integers(2, 12), st.data())
def test_kl_is_the_sum_by_hand_and_each_prediction_is_made_once(seed, n, window, data):
    stride = data.draw(st.integers(1, window))
    first, second = tables(seed)
    tokens = torch.randint(7, (n,), generator=torch.Generator().manual_seed(seed))
    found = compare(first, second, tokens, window, stride)
    alone = stride == window
    at = [i for i in range(n - 1) if not (alone and (i + 1) % window == 0)]  # predictions of token i + 1
    for k, i in enumerate(at):
        p, q = (m.table[tokens[i]].double().softmax(-1) for m in (first, second))
        assert found.kl[k].item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-5)
        assert found.loss[k].item() == pytest.approx(-q[tokens[i + 1]].log().item(), abs=1e-5)
        assert found.reference_loss[k].item() == pytest.approx(-p[tokens[i + 1]].log().item(), abs=1e-5)
        assert bool(found.same_top[k]) == bool(p.argmax() == q.argmax())
    assert len(found.kl) == len(at)
    assert found.flips == pytest.approx(1 - found.same_top.float().mean().item())
    assert found.perplexity == pytest.approx(math.exp(found.loss.mean().item()), rel=1e-5)
    assert found.mean_kl >= -1e-6


def test_windows_are_read_alone_unless_they_overlap():
    model = tables(0)[0]
    log_probs(model, torch.arange(14) % 7, window=6, stride=6)
    assert [len(w) for w in model.seen] == [6, 6, 2]
    model.seen.clear()
    assert (
        len(log_probs(model, torch.arange(13) % 7, window=6, stride=6)) == 10
    )  # a lone last token is not read
    assert [len(w) for w in model.seen] == [6, 6]


def test_a_model_does_not_differ_from_itself_and_stored_log_probs_do_as_well(tiny_llm):
    tokens = torch.randint(96, (1, 50), generator=torch.Generator().manual_seed(0))
    tiny_llm.train()
    found = compare(tiny_llm, tiny_llm, tokens, 16, 16)
    assert tiny_llm.training
    assert found.mean_kl == 0
    assert found.flips == 0
    stored = log_probs(tiny_llm, tokens, 16, 16)
    assert stored.shape == (3 * 15 + 1, 96)
    assert kl_divergence(stored, tiny_llm, tokens, 16, 16) == 0
    losses = compare(stored[:0].new_zeros(49, 96), tiny_llm, tokens, 16, 8).loss
    assert torch.allclose(losses, token_losses(tiny_llm, tokens, 16, 8), atol=1e-6)


def test_impossible_tokens_count_as_the_definition_says():
    p = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0], [0.0, -math.inf]])
    tokens = torch.tensor([0, 0])
    assert kl_divergence(Table(p), Table(q), tokens) == pytest.approx(math.log(2))  # 0 log 0 = 0
    assert kl_divergence(Table(q), Table(p), tokens) == math.inf


def test_bad_input_is_named(tiny_llm):
    tokens = torch.arange(20)
    for n, window, stride in ((1, 8, 4), (9, 1, 1), (9, 8, 9), (9, 8, 0)):
        with pytest.raises(ValueError, match="got"):
            log_probs(tiny_llm, tokens[:n], window, stride)
    for stored in (torch.zeros(18, 96), torch.zeros(40, 96), torch.zeros(19, 95)):
        with pytest.raises(ValueError, match="same tokens, window, stride and vocabulary"):
            compare(stored, tiny_llm, tokens)
    tiny_llm.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    tiny_llm.train()
    with pytest.raises(ValueError, match="logits hold NaN"):
        log_probs(tiny_llm, tokens)
    assert tiny_llm.training


def test_independent_values_get_the_textbook_interval():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1)).double()
    low, high = block_bootstrap(x, block=1, samples=4000)
    half = 1.96 * x.std().item() / math.sqrt(4000)
    assert low == pytest.approx(x.mean().item() - half, abs=0.08 * half)
    assert high == pytest.approx(x.mean().item() + half, abs=0.08 * half)
    assert block_bootstrap(x) == block_bootstrap(x)
    assert block_bootstrap(x) != block_bootstrap(x, seed=1)


def test_blocks_know_that_neighbors_are_alike():
    x = torch.randn(200, generator=torch.Generator().manual_seed(2)).repeat_interleave(
        20
    )  # 200 facts, told 20 times
    width = {b: (lambda i: i[1] - i[0])(block_bootstrap(x, block=b)) for b in (1, 20, 80)}
    honest = 2 * 1.96 * x.std().item() / math.sqrt(200)
    assert width[1] < 0.3 * honest
    assert 0.75 * honest < width[80] < 1.15 * honest


def test_the_bootstrap_names_bad_input():
    for bad in (torch.zeros(0), torch.zeros(2, 3), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="one row of finite numbers"):
            block_bootstrap(bad)
    for options in ({"block": 0}, {"block": 11}, {"level": 1.0}, {"samples": 0}):
        with pytest.raises(ValueError, match="need block 1 to 10"):
            block_bootstrap(torch.arange(10.0), **{"block": 5, **options})
