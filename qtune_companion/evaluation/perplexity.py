"""Perplexity with a sliding window: how surprised a causal LLM is by a text.

``exp(mean over tokens of -log p(token | what came before))``, with a window that moves by ``stride`` so
that every token but the text's first ones sees at least ``window - stride`` tokens of context. Explained
in chapter 6.

Copy this file: it needs only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["perplexity", "token_losses"]


@torch.inference_mode()
def token_losses(model: Any, tokens: Tensor, window: int = 512, stride: int = 256) -> Tensor:
    """Negative log likelihood of each token but the first, in nats.

    Parameters
    ----------
    model : causal language model
        ``model(input_ids=…).logits`` has shape (1, length, vocabulary).
    tokens : Tensor
        Integer token ids, (n,) or (1, n), n ≥ 2.
    window, stride : int
        Context length, and how far it moves: 1 ≤ stride ≤ window - 1.

    Returns
    -------
    Tensor
        float32, (n - 1,); each token is scored once.

    Raises
    ------
    ValueError
        On fewer than two tokens, a bad window or stride, or logits that are NaN.
    """
    ids = tokens.reshape(-1)
    if ids.numel() < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {ids.numel()}")
    if window < 2 or not 1 <= stride < window:
        raise ValueError(f"need window >= 2 and 1 <= stride < window, got window={window}, stride={stride}")
    device = next(iter(model.parameters())).device
    losses, done = [], 0  # ``done``: how many tokens after the first were scored
    for start in range(0, ids.numel(), stride):
        piece = ids[start : start + window].to(device)
        logits = model(input_ids=piece[None]).logits[0, :-1].float()  # (length - 1, vocabulary)
        nll = torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none")
        if nll.isnan().any():
            raise ValueError("the model's logits hold NaN: a weight, a scale or an input overflowed")
        losses.append(nll[done - start :].cpu())
        done = start + piece.numel() - 1
        if start + window >= ids.numel():
            break
    return torch.cat(losses)


def perplexity(model: Any, tokens: Tensor, window: int = 512, stride: int = 256) -> float:
    """Exponential of the mean of :func:`token_losses`.

    Parameters
    ----------
    model, tokens, window, stride
        See :func:`token_losses`.

    Returns
    -------
    float
        1 or more; the vocabulary's size for a model that guesses uniformly.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> class Shrug(torch.nn.Linear):
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))
    >>> round(perplexity(Shrug(1, 1), torch.arange(6)), 4)
    8.0
    """
    was_training = model.training
    model.eval()
    try:
        return token_losses(model, tokens, window, stride).double().mean().exp().item()
    finally:
        model.train(was_training)
