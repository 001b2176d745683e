import pytest
import torch

from qtune_companion.dracula import MOVES, load_speeches, to_prompts
from qtune_companion.evaluation.next_move import next_move_accuracy, next_move_scores
from qtune_companion.models import load_model, load_tokenizer

LABELS = [f" {m}" for m in MOVES]


@pytest.mark.parametrize("name", ["smollm2-135m", "minilm-l6"])
def test_batches_and_padding_do_not_change_the_scores(name):
    model, tokenizer = load_model(name), load_tokenizer(name)
    prompts = list(to_prompts(load_speeches("castle", "test").select(range(6)))["prompt"])
    together = next_move_scores(model, tokenizer, prompts, LABELS, batch_size=4)
    alone = torch.cat([next_move_scores(model, tokenizer, [p], LABELS) for p in prompts])
    assert together.shape == (6, 8)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_scores_are_the_models_last_logits():
    model, tokenizer = load_model(), load_tokenizer()
    prompt = to_prompts(load_speeches("castle", "test").select(range(1)))[0]["prompt"]
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    wanted = logits[[tokenizer(label).input_ids[0] for label in LABELS]]
    torch.testing.assert_close(
        next_move_scores(model, tokenizer, [prompt], LABELS)[0], wanted, rtol=1e-4, atol=1e-4
    )


def test_accuracy_counts_and_restores_the_tokenizer():
    model, tokenizer = load_model(), load_tokenizer()
    records = list(to_prompts(load_speeches("castle", "test").select(range(5))))
    scores = next_move_scores(model, tokenizer, [r["prompt"] for r in records], LABELS)
    best = [LABELS[i] for i in scores.argmax(1)]
    side = tokenizer.padding_side
    right = [{**r, "completion": b} for r, b in zip(records, best, strict=True)]
    assert next_move_accuracy(model, tokenizer, right, LABELS) == 1.0
    right[0]["completion"] = next(label for label in LABELS if label != best[0])
    assert next_move_accuracy(model, tokenizer, right, LABELS) == pytest.approx(0.8)
    assert tokenizer.padding_side == side


def test_bad_input_is_named():
    model, tokenizer = torch.nn.Linear(1, 1), load_tokenizer()
    with pytest.raises(ValueError, match="empty"):
        next_move_accuracy(model, tokenizer, [])
    with pytest.raises(ValueError, match="not among the labels"):
        next_move_accuracy(model, tokenizer, [{"prompt": "a", "completion": " fly"}], LABELS)
    with pytest.raises(ValueError, match="tokens; next-move"):
        next_move_scores(model, tokenizer, ["a"], [" attack", " antidisestablishmentarianism"])
    with pytest.raises(ValueError, match="share a token"):
        next_move_scores(model, tokenizer, ["a"], [" attack", " attack"])


RECORDS = [{"prompt": f"a count of {n}", "completion": LABELS[n % 2]} for n in range(4)]


def test_a_tie_is_no_hit_and_nan_is_an_error(tiny):
    model, tokenizer = load_model(str(tiny / "model")), load_tokenizer(str(tiny / "model"))
    model.model.norm.weight.data.zero_()  # all logits are 0
    assert next_move_accuracy(model, tokenizer, RECORDS, LABELS) == 0
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits hold NaN"):
        next_move_accuracy(model, tokenizer, RECORDS, LABELS)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        next_move_scores(model, tokenizer, ["a"], LABELS, batch_size=-1)


def test_a_tokenizer_without_padding_serves_and_stays_so(tiny):
    model, tokenizer = load_model(str(tiny / "model")), load_tokenizer(str(tiny / "model"))
    prompts = ["a", "a much longer prompt than the other"]
    wanted = next_move_scores(model, tokenizer, prompts, LABELS)
    tokenizer.pad_token = None
    torch.testing.assert_close(next_move_scores(model, tokenizer, prompts, LABELS), wanted)
    assert tokenizer.pad_token is None


def test_a_long_prompt_keeps_its_end(tiny):
    model, tokenizer = load_model(str(tiny / "model")), load_tokenizer(str(tiny / "model"))
    prompt = "one two three four five six seven eight"
    with pytest.warns(UserWarning, match="cut from the left to 4 tokens"):
        cut = next_move_scores(model, tokenizer, [prompt], LABELS, max_length=4)
    torch.testing.assert_close(cut, next_move_scores(model, tokenizer, [" five six seven eight"], LABELS))
