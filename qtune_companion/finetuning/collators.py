"""Collators: records of ``prompt`` and ``completion`` to batches, for a causal LLM and for an encoder.

The same records serve both: a causal LLM continues the prompt (Radford et al. 2019), an encoder fills
a mask put after it, a cloze question (Devlin et al. 2018, arXiv:1810.04805; Schick & Schütze 2020,
arXiv:2001.07676). Explained in chapter 15.

Copy this file: it needs torch and a Hugging Face tokenizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ClozeCollator", "CompletionCollator"]

IGNORE = -100  # the label that PyTorch's cross entropy skips


def _fit(ids: list[int], room: int, what: str) -> list[int]:
    """Keep the last ``room`` tokens of a prompt, with a warning when some go."""
    if room < 1:
        raise ValueError(f"max_length leaves no room for the prompt beside {what}")
    if len(ids) > room:
        warnings.warn(
            f"a prompt of {len(ids)} tokens was cut from the left to {room}; {what} is kept", stacklevel=4
        )
        return ids[-room:]
    return ids


def _check(records: Sequence[dict[str, Any]]) -> None:
    if not records:
        raise ValueError("no records to collate")
    for record in records:
        if "prompt" not in record or "completion" not in record:
            raise ValueError(f"a record needs prompt and completion, got {sorted(record)}")


@dataclass
class CompletionCollator:
    """Batches for a causal LLM, with loss on the completion alone.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Pads with its pad token, or its end-of-text token.
    max_length : int
        Longer prompts lose tokens on the left; the completion is kept whole.
    trim_logits : bool
        Ask the model for the completion's logits only (``logits_to_keep``): the output layer of a small
        LLM with a large vocabulary is a large part of its work.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` (batch, length), padded on the left; ``labels``, -100 but on
        the completion, (batch, length) or, trimmed, (batch, logits_to_keep).
    """

    tokenizer: Any
    max_length: int = 512
    trim_logits: bool = True

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate records with ``prompt`` and ``completion``."""
        _check(records)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        rows, answers = [], []
        for record in records:
            answer = self.tokenizer(record["completion"], add_special_tokens=False).input_ids
            prompt = self.tokenizer(record["prompt"]).input_ids
            rows.append(_fit(prompt, self.max_length - len(answer), "the completion") + answer)
            answers.append(len(answer))
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), pad)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORE)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
            labels[i, length - answer :] = ids[i, length - answer :]
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.trim_logits:
            keep = min(length, max(answers) + 1)  # position t predicts token t + 1
            batch["labels"] = labels[:, -keep:]
            batch["logits_to_keep"] = keep
        return batch


@dataclass
class ClozeCollator:
    """Batches for a masked language model: ``prompt [MASK] .`` with loss on the mask alone.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Must have a mask token.
    max_length : int
        Longer prompts lose tokens on the left; the mask is kept.
    """

    tokenizer: Any
    max_length: int = 512

    def __post_init__(self) -> None:
        """Refuse a tokenizer without a mask."""
        if self.tokenizer.mask_token_id is None:
            raise ValueError(
                "the tokenizer has no mask token: a cloze question needs a masked language model"
            )

    def answer_id(self, completion: str) -> int:
        """The one token of a completion.

        Raises
        ------
        ValueError
            When it takes more than one: a single mask cannot be filled with it.
        """
        ids = self.tokenizer(completion.strip(), add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"{completion.strip()!r} takes {len(ids)} tokens; a cloze answer must be one")
        return int(ids[0])

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate records with ``prompt`` and ``completion`` (one token)."""
        _check(records)
        tok = self.tokenizer
        tail = [tok.mask_token_id, *tok(".", add_special_tokens=False).input_ids]
        room = self.max_length - len(tail) - tok.num_special_tokens_to_add()
        rows = []
        for record in records:
            prompt = tok(record["prompt"], add_special_tokens=False).input_ids
            rows.append(tok.build_inputs_with_special_tokens(_fit(prompt, room, "the mask") + tail)
                        if hasattr(tok, "build_inputs_with_special_tokens")
                        else [tok.cls_token_id, *_fit(prompt, room, "the mask"), *tail, tok.sep_token_id])  # fmt: skip
        batch = tok.pad({"input_ids": rows}, return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], IGNORE)
        answers = torch.tensor([self.answer_id(r["completion"]) for r in records])
        labels[torch.arange(len(rows)), [len(r) - 2 - len(tail) + 1 for r in rows]] = answers
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
