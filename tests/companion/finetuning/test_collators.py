import pytest
import torch

from qtune_companion.finetuning.collators import ClozeCollator, CompletionCollator
from qtune_companion.models import load_model, load_tokenizer

RECORDS = [
    {"prompt": "the count will", "completion": " hide"},
    {"prompt": "tonight at last the old count will", "completion": " spy"},
]


def test_pads_left_and_scores_the_completion_alone(word_tokenizer):
    batch = CompletionCollator(word_tokenizer, trim_logits=False)(RECORDS)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].tolist() == [[0] * 4 + [1] * 4, [1] * 8]
    assert (batch["labels"][:, :-1] == -100).all()
    assert torch.equal(batch["labels"][:, -1], batch["input_ids"][:, -1])


def test_trimmed_logits_give_the_same_loss(tiny_llm, word_tokenizer):
    full = CompletionCollator(word_tokenizer, trim_logits=False)(RECORDS)
    trimmed = CompletionCollator(word_tokenizer)(RECORDS)
    assert trimmed["logits_to_keep"] == 2
    with torch.no_grad():
        a, b = tiny_llm(**full), tiny_llm(**trimmed)
    assert b.logits.shape[1] == 2
    torch.testing.assert_close(a.loss, b.loss)


def test_a_long_prompt_loses_its_beginning_with_a_warning(word_tokenizer):
    with pytest.warns(UserWarning, match="7 tokens was cut from the left to 4"):
        batch = CompletionCollator(word_tokenizer, max_length=5)(RECORDS)
    kept = word_tokenizer("the old count will spy").input_ids
    assert batch["input_ids"][1].tolist() == kept


def test_cloze_puts_the_mask_after_the_prompt_and_keeps_it():
    tokenizer = load_tokenizer("minilm-l6")
    collate = ClozeCollator(tokenizer, max_length=8)
    with pytest.warns(UserWarning, match="the mask is kept"):
        batch = collate(RECORDS)
    at = batch["input_ids"] == tokenizer.mask_token_id
    assert at.sum(1).tolist() == [1, 1]
    assert batch["labels"][at].tolist() == [collate.answer_id(r["completion"]) for r in RECORDS]
    assert (batch["labels"][~at] == -100).all()
    text = tokenizer.decode(batch["input_ids"][1])
    assert text == "[CLS] the old count will [MASK]. [SEP]"
    assert torch.isfinite(load_model("minilm-l6")(**batch).loss)


def test_bad_input_is_named(word_tokenizer):
    with pytest.raises(ValueError, match="no records"):
        CompletionCollator(word_tokenizer)([])
    with pytest.raises(ValueError, match="needs prompt and completion"):
        CompletionCollator(word_tokenizer)([{"text": "x"}])
    with pytest.raises(ValueError, match="no room"):
        CompletionCollator(word_tokenizer, max_length=1)(RECORDS)
    with pytest.raises(ValueError, match="no mask token"):
        ClozeCollator(word_tokenizer)
    with pytest.raises(ValueError, match="must be one"):
        ClozeCollator(load_tokenizer("minilm-l6")).answer_id("antidisestablishmentarianism")
