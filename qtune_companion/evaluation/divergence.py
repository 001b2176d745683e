"""How far a quantized language model has drifted: KL divergence, flipped tokens, bootstrap intervals.

The mean over predictions of ``KL(p || q) = sum_k p_k log(p_k / q_k)``, p the reference's distribution over the next
token and q the quantized model's: Kullback & Leibler 1951. Flips: Dutta et al. 2024, "Accuracy is Not All You Need"
(arXiv:2407.09141), here of the likeliest token. Intervals: the circular block bootstrap, Politis & Romano 1992.
Explained in chapter 6.

Copy this file: it needs only torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Divergence", "block_bootstrap", "compare", "kl_divergence", "log_probs"]


_ROWS = 16  # predictions compared at once, few enough to stay in the cache


@dataclass(frozen=True)
class Divergence:
    """What :func:`compare` found, one entry a prediction: (predictions,), float32 in nats, or bool."""

    kl: Tensor  # KL(reference || model)
    loss: Tensor  # -log q of the token that came
    reference_loss: Tensor  # -log p of it
    same_top: Tensor  # whether both find the same token likeliest

    @property
    def mean_kl(self) -> float:
        """Nats a prediction; 0 when nothing changed."""
        return self.kl.double().mean().item()

    @property
    def flips(self) -> float:
        """Share of predictions whose likeliest token changed, 0 to 1."""
        return 1 - self.same_top.double().mean().item()

    @property
    def perplexity(self) -> float:
        """The model's, over the same predictions; the reference's is ``reference_loss.mean().exp()``."""
        return self.loss.double().mean().exp().item()


def _windows(model: Any, tokens: Tensor, window: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (predictions, vocabulary) and the tokens that came (predictions,), window by window."""
    ids, done = tokens.reshape(-1), 0  # done: the last token that was predicted
    if ids.numel() < 2:
        raise ValueError(f"a prediction needs at least 2 tokens, got {ids.numel()}")
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"need window >= 2 and 1 <= stride <= window, got window={window}, stride={stride}")
    device = next(iter([*model.parameters(), *model.buffers()])).device
    was_training = model.training
    model.eval()
    try:
        for start in range(0, ids.numel(), stride):
            piece, known = ids[start : start + window].to(device), max(0, done - start)
            if piece.numel() - 1 <= known:
                break
            logits = model(input_ids=piece[None]).logits[0, known:-1].float()
            if logits.amax().isnan():
                raise ValueError("the model's logits hold NaN: a weight, a scale or an input overflowed")
            yield logits, piece[known + 1 :]
            done = start + piece.numel() - 1
    finally:
        model.train(was_training)


@torch.no_grad()
def log_probs(model: Any, tokens: Tensor, window: int = 512, stride: int = 512) -> Tensor:
    """Log-probabilities of the whole vocabulary at each prediction, to compare many models with.

    Parameters
    ----------
    model : causal language model
        ``model(input_ids=…).logits`` has shape (1, length, vocabulary). Evaluated in eval mode.
    tokens : Tensor
        Integer token ids, (n,) or (1, n), n ≥ 2.
    window, stride : int
        Context length, and how far it moves, 1 ≤ stride ≤ window. With ``stride == window`` each window is read
        alone and its first token not predicted; else every token but the text's first is predicted once.

    Returns
    -------
    Tensor
        float32, (predictions, vocabulary): 0.4 GB for 2,048 tokens and a vocabulary of 49,152.

    Raises
    ------
    ValueError
        On fewer than two tokens, a bad window or stride, or logits that are NaN.
    """
    return torch.cat([logits.log_softmax(-1) for logits, _ in _windows(model, tokens, window, stride)])


@torch.no_grad()
def compare(reference: Any, model: Any, tokens: Tensor, window: int = 512, stride: int = 512) -> Divergence:
    """Hold a model against a reference, prediction by prediction.

    ``reference`` is the unquantized model, or what :func:`log_probs` found with it on the same tokens, window and
    stride. The rest as there. Raises ValueError as it does, or when the two differ in predictions or vocabulary.
    """
    expected = reference if isinstance(reference, Tensor) else log_probs(reference, tokens, window, stride)
    columns: list[list[Tensor]] = [[], [], [], []]
    at = 0
    for logits, came in _windows(model, tokens, window, stride):
        fits = logits.shape[1:] == expected.shape[1:] and at + len(logits) <= len(expected)
        if not fits:
            break
        for rows, next_tokens in zip(logits.split(_ROWS), came.split(_ROWS), strict=True):
            p, found = expected[at : at + len(rows)].to(rows.device), rows.log_softmax(-1)
            at += len(rows)
            kl = torch.where(p > -math.inf, p.exp() * (p - found), 0).sum(-1)  # 0 log 0 = 0
            losses = [-x.gather(1, next_tokens[:, None])[:, 0] for x in (found, p)]
            for column, values in zip(columns, (kl, *losses, p.argmax(-1) == found.argmax(-1)), strict=True):
                column.append(values.cpu())
    if not fits or at != len(expected):
        raise ValueError(
            f"the reference's {tuple(expected.shape)} (predictions, vocabulary) do not fit the model's: use the same "
            f"tokens, window, stride and vocabulary"
        )
    return Divergence(*[torch.cat(column) for column in columns])


def kl_divergence(reference: Any, model: Any, tokens: Tensor, window: int = 512, stride: int = 512) -> float:
    """Mean KL(reference || model) in nats a prediction; arguments and errors are those of :func:`compare`."""
    return compare(reference, model, tokens, window, stride).mean_kl


def block_bootstrap(
    values: Tensor, block: int = 64, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval (low, high) of the mean of ``values`` (n,), in the text's order.

    Blocks of neighbors are drawn with replacement until the sample is about as long as the data; the text is closed
    to a ring, so that every entry is drawn alike. A block should be longer than neighbors resemble each other, and
    much shorter than the text. To compare two models on one text, give their differences.

    Raises ValueError on values that are not one row of finite numbers, a block outside 1 … n, a level outside 0 … 1.

    Examples
    --------
    >>> block_bootstrap(torch.arange(100.0) % 10, block=10)  # any ten neighbors are the same ten numbers
    (4.5, 4.5)
    """
    n = values.numel()
    if values.ndim != 1 or n == 0 or not torch.isfinite(values).all():
        raise ValueError(f"values must be one row of finite numbers, got shape {tuple(values.shape)}")
    if not 1 <= block <= n or not 0 < level < 1 or samples < 1:
        raise ValueError(f"need block 1 to {n}, level in (0, 1), samples; got {block}, {level}, {samples}")
    ring = torch.cat([values, values[: block - 1]]).double().cpu()
    means = ring.unfold(0, block, 1).mean(1)  # (n,): of the block that starts at each entry
    drawn = torch.randint(
        n, (samples, max(1, round(n / block))), generator=torch.Generator().manual_seed(seed)
    )
    low, high = (
        means[drawn].mean(1).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist()
    )
    return low, high
