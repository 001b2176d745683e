import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtune_companion.dracula import load_speeches
from qtune_companion.models import load_tokenizer
from qtune_companion.recipes import FinetuneConfig


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a small Llama with the embedded model's tokenizer, and a data file of 48 speeches."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    ))  # fmt: skip
    model.save_pretrained(folder / "model")
    load_tokenizer().save_pretrained(folder / "model")
    rows = load_speeches("castle", "train").select(range(48))
    lines = [json.dumps({"speech": r["speech"], "move": r["move"], "split": "train"}) for r in rows]
    test = load_speeches("castle", "test").select(range(8))
    lines += [json.dumps({"speech": r["speech"], "move": r["move"], "split": "test"}) for r in test]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def config(tiny):
    """Makes the settings of a short training of the small Llama."""

    def make(output, **changes):
        values = {"model": str(tiny / "model"), "data": str(tiny / "data.jsonl"), "output": str(output)}
        values |= {
            "epochs": 2,
            "batch_size": 4,
            "save_steps": 3,
            "dropout": 0.1,
            "progress": False,
            "compute": "fp32",
        }
        return FinetuneConfig(**(values | changes))

    return make
