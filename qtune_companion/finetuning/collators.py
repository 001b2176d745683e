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

__all__ = ["ClozeCollator", "CompletionCollator", "completion_loss"]

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
    prompt_every : int
        Above 0, also keep the logits of every ``prompt_every``-th prompt token, for :func:`completion_loss`. Which
        ones depends on the batch alone, so that epochs see different tokens and a resumed run the same.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` (batch, length), padded on the left; ``labels``, -100 but on
        the completion, (batch, length) or, trimmed, (batch, logits_to_keep). With ``prompt_every``:
        ``logits_to_keep`` holds the k kept columns, and ``labels`` (batch, 2, k) what follows each of them,
        -100 but on the completion (first plane) and but on the prompt (second).
    """

    tokenizer: Any
    max_length: int = 512
    trim_logits: bool = True
    prompt_every: int = 0

    def __post_init__(self) -> None:
        """Refuse a share of the prompt that is none."""
        if self.prompt_every < 0:
            raise ValueError(f"prompt_every must be 0 (off) or a stride of tokens, got {self.prompt_every}")

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate records with ``prompt`` and ``completion``."""
        _check(records)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        rows, answers = [], []
        for record in records:
            answer = self.tokenizer(record["completion"], add_special_tokens=False).input_ids
            prompt = self.tokenizer(record["prompt"]).input_ids
            if not (prompt and answer):
                raise ValueError(f"prompt and completion need at least one token each, got {record!r}")
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
        if self.prompt_every:
            return batch | self._with_prompt(ids, mask, labels, max(answers))
        if self.trim_logits:
            keep = min(length, max(answers) + 1)  # position t predicts token t + 1
            batch["labels"] = labels[:, -keep:]
            batch["logits_to_keep"] = keep
        return batch

    def _with_prompt(self, ids: Tensor, mask: Tensor, labels: Tensor, answer: int) -> dict[str, Tensor]:
        """Kept columns, and in two planes the labels of what follows them: completion and prompt."""
        end = ids.shape[1] - 1 - answer  # the column whose logits predict the completion
        first = min(int(ids.sum()) % self.prompt_every, end)
        columns = torch.cat(
            [torch.arange(first, end, self.prompt_every), torch.arange(end, ids.shape[1] - 1)]
        )
        after = columns + 1  # position t predicts token t + 1
        seen = (mask[:, columns] == 1) & (labels[:, after] == IGNORE)
        prompt = torch.where(seen, ids[:, after], IGNORE)
        return {"logits_to_keep": columns, "labels": torch.stack([labels[:, after], prompt], dim=1)}


def completion_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Any = None,
    prompt_weight: float = 0.0,
    answers: Sequence[int] = (),
    among: float = 0.5,
) -> Tensor:
    """Loss of the completion, and of the prompt's kept tokens.

    The completion's cross entropy is taken twice where the possible answers are known: over the vocabulary,
    and over the answers alone, since only their order decides. A model that must also go on predicting the
    prompt (``prompt_weight``) forgets less of what it knows. For ``Trainer``'s ``compute_loss_func``, with
    ``functools.partial``.

    Parameters
    ----------
    outputs : ModelOutput
        ``logits`` (batch, k, vocabulary).
    labels : Tensor
        (batch, 2, k), from a :class:`CompletionCollator` with ``prompt_every``.
    num_items_in_batch
        Given by ``Trainer``, unused: each mean is over the batch's own tokens.
    prompt_weight : float
        Factor of the prompt's cross entropy.
    answers : sequence of int
        The tokens that a completion, one token long, can be.
    among : float
        Share of the completion's loss that is taken over ``answers`` alone.

    Returns
    -------
    Tensor
        Scalar, nats.

    Raises
    ------
    ValueError
        When the labels have no two planes, or a completion is not among the answers.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> outputs, labels = SimpleNamespace(logits=torch.zeros(1, 2, 4)), torch.tensor([[[-100, 3], [2, -100]]])
    >>> completion_loss(outputs, labels, prompt_weight=0.5)  # ln 4 + 0.5 ln 4
    tensor(2.0794)
    >>> completion_loss(outputs, labels, answers=[1, 3], among=1.0)  # ln 2
    tensor(0.6931)
    """
    if labels.dim() != 3 or labels.shape[1] != 2:
        raise ValueError(f"labels must be (batch, 2, k), got {tuple(labels.shape)}: set prompt_every")
    cross_entropy = torch.nn.functional.cross_entropy
    completion, prompt = labels.to(outputs.logits.device).unbind(1)
    logits, truth = (
        outputs.logits[completion != IGNORE].float(),
        completion[completion != IGNORE],
    )  # (n, V), (n,)
    loss = cross_entropy(logits, truth)
    if len(answers):
        choices = torch.tensor(list(answers), device=truth.device)
        chosen = truth[:, None] == choices  # (n, answers)
        if not chosen.any(1).all():
            raise ValueError(
                f"completion {truth[~chosen.any(1)][0].item()} is not among the answers {list(answers)}"
            )
        loss = (1 - among) * loss + among * cross_entropy(logits[:, choices], chosen.int().argmax(1))
    if prompt_weight and (prompt != IGNORE).any():  # no copy of the many logits, as picking rows would make
        rest = cross_entropy(outputs.logits.flatten(0, 1).float(), prompt.flatten(), ignore_index=IGNORE)
        loss = loss + prompt_weight * rest
    return loss


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
        batch = tok.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
        labels = torch.full_like(batch["input_ids"], IGNORE)
        answers = torch.tensor([self.answer_id(r["completion"]) for r in records])
        labels[torch.arange(len(rows)), [len(r) - 2 - len(tail) + 1 for r in rows]] = answers
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
