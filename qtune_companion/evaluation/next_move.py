"""Next-move accuracy: does the model's next token name the right answer, among the answers there are?

The answer with the highest logit wins: a cloze evaluation restricted to the label words, as in Schick &
Schütze 2020 (arXiv:2001.07676), section 3. Explained in chapter 11.

Copy this file: it needs torch and a Hugging Face model and tokenizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["next_move_accuracy", "next_move_scores"]


def label_ids(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """The one token of each label.

    Raises
    ------
    ValueError
        When a label takes several tokens, or two labels share one.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> by_length = lambda text, **_: SimpleNamespace(input_ids=[len(text)])
    >>> label_ids(by_length, [" hide", " attack"])
    [5, 7]
    """
    masked = getattr(tokenizer, "mask_token_id", None) is not None
    found = []
    for label in labels:
        ids = tokenizer(label.strip() if masked else label, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"label {label!r} takes {len(ids)} tokens; next-move accuracy needs one each")
        found.append(int(ids[0]))
    if len(set(found)) < len(found):
        raise ValueError(f"two of the labels {list(labels)} share a token")
    return found


def context_length(model: Any, tokenizer: Any, wish: int) -> int:
    """Tokens that fit: at most ``wish``, and no more than the model has positions or the tokenizer allows."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None) or wish
    return min(wish, positions, getattr(tokenizer, "model_max_length", None) or wish)


@torch.inference_mode()
def next_move_scores(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    labels: Sequence[str],
    batch_size: int = 16,
    max_length: int = 512,
    progress: Any = None,
) -> Tensor:
    """Logits of each label after each prompt.

    Parameters
    ----------
    model : PreTrainedModel
        Causal, or masked: a tokenizer with a mask token gets the mask and a full stop after the prompt.
    prompts : sequence of str
        Cut from the left, with a warning, to ``max_length`` tokens or to what the model can read.
    labels : sequence of str
        Completions of one token, such as ``" attack"``.
    progress : callable, optional
        Wraps the iterable of batches, for instance ``tqdm``.

    Returns
    -------
    Tensor
        float32, (prompts, labels).

    Raises
    ------
    ValueError
        On no prompts, a batch size below 1, labels of several tokens, or logits that are NaN.
    """
    if not prompts:
        raise ValueError("no prompts to score")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    wanted = torch.tensor(label_ids(tokenizer, labels))
    masked = tokenizer.mask_token_id is not None
    device = next(iter([*model.parameters(), *model.buffers()])).device
    text = [f"{p} {tokenizer.mask_token}." if masked else p for p in prompts]
    room = context_length(model, tokenizer, max_length)
    if long := sum(len(ids) > room for ids in tokenizer(text, verbose=False).input_ids):
        warnings.warn(f"{long} of {len(text)} prompts were cut from the left to {room} tokens", stacklevel=2)
    order = sorted(range(len(text)), key=lambda i: len(text[i]))  # like lengths together: less padding
    batches: Iterable[list[int]] = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    scores = torch.empty(len(text), len(labels))
    was_training, side, cut = model.training, tokenizer.padding_side, tokenizer.truncation_side
    no_pad = getattr(tokenizer, "pad_token_id", None) is None
    model.eval()
    # an encoder counts its positions from the left end, so its padding goes right
    tokenizer.padding_side, tokenizer.truncation_side = ("right" if masked else "left"), "left"
    try:
        if no_pad:  # what stands in its place is masked
            tokenizer.pad_token = tokenizer.eos_token
        for rows in progress(batches) if progress else batches:
            batch = tokenizer(
                [text[i] for i in rows],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=room,
            ).to(device)
            if masked:
                at = (
                    batch["input_ids"] == tokenizer.mask_token_id
                ).nonzero()  # (rows, 2), the last mask a row
                at = {int(r): int(c) for r, c in at}
                logits = model(**batch).logits[torch.arange(len(rows)), [at[r] for r in range(len(rows))]]
            else:
                batch.pop("token_type_ids", None)
                logits = model(**batch, logits_to_keep=1).logits[:, -1]
            scores[rows] = logits.float().cpu()[:, wanted]
    finally:
        tokenizer.padding_side, tokenizer.truncation_side = side, cut
        if no_pad:
            tokenizer.pad_token = None
        model.train(was_training)
    if scores.isnan().any():
        raise ValueError("the model's logits hold NaN: a weight, a scale or an input overflowed")
    return scores


def next_move_accuracy(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    labels: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: Any = None,
    max_length: int = 512,
) -> float:
    """Share of records whose completion outscores every other label.

    Parameters
    ----------
    dataset : iterable of dict
        Records with ``prompt`` and ``completion``.
    labels : sequence of str, optional
        The completions to choose from; default: all that occur in ``dataset``.
    batch_size, progress, max_length
        See :func:`next_move_scores`.

    Returns
    -------
    float
        0 to 1.

    Raises
    ------
    ValueError
        On an empty dataset, or a completion that is not among the labels.
    """
    records = list(dataset)
    if not records:
        raise ValueError("the dataset is empty")
    labels = sorted({r["completion"] for r in records}) if labels is None else list(labels)
    if strange := {r["completion"] for r in records} - set(labels):
        raise ValueError(f"completions {sorted(strange)} are not among the labels {labels}")
    prompts = [r["prompt"] for r in records]
    scores = next_move_scores(model, tokenizer, prompts, labels, batch_size, max_length, progress)
    truth = torch.tensor([[labels.index(r["completion"])] for r in records])  # (records, 1)
    others = scores.scatter(1, truth, -torch.inf).amax(1)
    return (scores.gather(1, truth)[:, 0] > others).float().mean().item()
