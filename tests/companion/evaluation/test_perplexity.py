import math
from types import SimpleNamespace

import pytest
import torch

from qtune_companion.evaluation.perplexity import perplexity, token_losses


class Uniform(torch.nn.Module):
    """Guesses every token alike; remembers the windows it saw."""

    def __init__(self, vocabulary=10):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.vocabulary, self.seen = vocabulary, []

    def forward(self, input_ids):
        self.seen.append(input_ids[0].tolist())
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocabulary))


@pytest.mark.parametrize("length", [2, 3, 8, 9, 25])
def test_every_token_is_scored_once(length):
    model = Uniform()
    losses = token_losses(model, torch.arange(length) % 10, window=8, stride=3)
    assert losses.shape == (length - 1,)
    assert perplexity(model, torch.arange(length) % 10, 8, 3) == pytest.approx(10, rel=1e-6)


def test_windows_overlap_as_said():
    model = Uniform(20)
    token_losses(model, torch.arange(12), window=8, stride=5)
    assert model.seen == [list(range(8)), list(range(5, 12))]


def test_one_window_equals_the_models_own_loss(tiny_llm):
    ids = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = tiny_llm(input_ids=ids, labels=ids).loss.item()
    assert perplexity(tiny_llm, ids, 64, 32) == pytest.approx(math.exp(loss), rel=1e-5)
    tiny_llm.train()
    perplexity(tiny_llm, ids, 16, 8)
    assert tiny_llm.training


@pytest.mark.parametrize(("n", "window", "stride"), [(1, 8, 4), (9, 1, 1), (9, 8, 8), (9, 8, 0)])
def test_bad_input_is_named(n, window, stride):
    with pytest.raises(ValueError, match="got"):
        perplexity(Uniform(), torch.zeros(n, dtype=torch.long), window, stride)


def test_a_hopeless_model_has_infinite_perplexity_and_a_broken_one_none(tiny_llm):
    tokens = torch.arange(20)
    tiny_llm.model.norm.weight.data.fill_(1e6)
    assert perplexity(tiny_llm, tokens, window=8, stride=4) == torch.inf
    tiny_llm.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits hold NaN"):
        perplexity(tiny_llm, tokens, window=8, stride=4)
