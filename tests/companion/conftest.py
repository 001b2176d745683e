from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def tiny_llm():
    """A Llama of two layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class WordTokenizer:
    """A token a word, for tests of collators and evaluation."""

    pad_token_id, eos_token_id, mask_token_id = 0, 1, None
    padding_side = truncation_side = "right"

    def __init__(self):
        self.vocabulary = {}

    def __call__(self, text, add_special_tokens=True, **kwargs):
        ids = [self.vocabulary.setdefault(w, len(self.vocabulary) + 2) for w in text.split()]
        return SimpleNamespace(input_ids=ids)


@pytest.fixture
def word_tokenizer():
    return WordTokenizer()
