import pytest
import torch

from qtune_companion.finetuning.collators import ClozeCollator, CompletionCollator, completion_loss
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


def test_prompt_tokens_are_kept_by_the_stride_and_weighed(tiny_llm, word_tokenizer):
    plain = CompletionCollator(word_tokenizer, trim_logits=False)(RECORDS)
    batch = CompletionCollator(word_tokenizer, prompt_every=2)(RECORDS)
    ids, mask, columns = batch["input_ids"], batch["attention_mask"], batch["logits_to_keep"].tolist()
    assert columns[-1] == 6  # the column before the completion's
    assert columns[:-1] == list(range(columns[0], 6, 2))
    completion, prompt = batch["labels"].unbind(1)
    with torch.no_grad():
        logits = tiny_llm(**{k: v for k, v in batch.items() if k != "labels"})
        whole = tiny_llm(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits.logits, whole[:, columns])
    wanted = [  # (row, column) pairs whose next token is a real prompt token
        (r, c) for r in range(2) for c in columns if mask[r, c] and plain["labels"][r, c + 1] == -100
    ]
    assert (prompt != -100).sum() == len(wanted) > 0
    prompt_nll = torch.stack([-whole[r, c].log_softmax(-1)[ids[r, c + 1]] for r, c in wanted]).mean()
    answer_nll = torch.stack([-whole[r, 6].log_softmax(-1)[ids[r, 7]] for r in range(2)]).mean()
    assert (completion != -100).sum() == 2
    torch.testing.assert_close(
        completion_loss(logits, batch["labels"], prompt_weight=0.25), answer_nll + prompt_nll / 4
    )
    torch.testing.assert_close(completion_loss(logits, batch["labels"]), answer_nll)
    hide, spy = (word_tokenizer(w).input_ids[0] for w in ("hide", "spy"))
    among = [(whole[0, 6], 0), (whole[1, 6], 1)]
    pair_nll = torch.stack([-z[[hide, spy]].log_softmax(-1)[i] for z, i in among]).mean()
    got = completion_loss(logits, batch["labels"], answers=[hide, spy], among=0.75)
    torch.testing.assert_close(got, answer_nll / 4 + pair_nll * 3 / 4)
    with pytest.raises(ValueError, match=f"completion {spy} is not among the answers"):
        completion_loss(logits, batch["labels"], answers=[hide])


def test_kept_prompt_tokens_hang_on_the_batch_alone(word_tokenizer):
    collate = CompletionCollator(word_tokenizer, prompt_every=3)
    first = [collate(RECORDS[i : i + 1])["logits_to_keep"].tolist() for i in (0, 1)]
    again = [collate(RECORDS[i : i + 1])["logits_to_keep"].tolist() for i in (0, 1)]
    assert first == again
    rare = CompletionCollator(word_tokenizer, prompt_every=1000)(RECORDS)  # a stride beyond the prompt
    assert rare["logits_to_keep"].tolist() == [6]
    assert (rare["labels"][:, 0] != -100).all()
    with pytest.raises(ValueError, match="prompt_every must be 0"):
        CompletionCollator(word_tokenizer, prompt_every=-1)
    with pytest.raises(ValueError, match=r"labels must be \(batch, 2, k\), got \(2, 5\)"):
        completion_loss(None, torch.zeros(2, 5))


@pytest.mark.parametrize(
    "record", [{"prompt": "", "completion": " spy"}, {"prompt": "he will", "completion": ""}]
)
@pytest.mark.parametrize("prompt_every", [0, 2])
def test_empty_prompts_and_completions_are_refused(word_tokenizer, record, prompt_every):
    collate = CompletionCollator(word_tokenizer, prompt_every=prompt_every)
    with pytest.raises(ValueError, match="need at least one token each"):
        collate([*RECORDS, record])


def test_cloze_finds_the_mask_however_the_tokenizer_pads():
    tokenizer = load_tokenizer("minilm-l6")
    tokenizer.padding_side = "left"
    batch = ClozeCollator(tokenizer)(RECORDS)
    assert torch.equal(batch["labels"] != -100, batch["input_ids"] == tokenizer.mask_token_id)
