"""Cross-entropy that never holds (B, T, V): the tokens are cut into chunks.

The same two functions as `jaxchat/loss.py`. `cross_entropy` computes its own gradient while it
computes the loss, chunk by chunk, because the logits are at hand exactly once. `token_scores` is
the evaluation form: per-token losses and the argmax, no gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.gpt import product

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at the same time (1024 x 32768 float32 is 128 MiB, for 8 GB Macs)."""


def cross_entropy(
    hidden: Float[Tensor, "B T D"],
    lm_head: Float[Tensor, "P D"],
    targets: Int[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    vocab_size: int,
    softcap: float,
) -> Float[Tensor, ""]:
    """Sum over tokens of `weights` times the nats of `targets`, in float32.

    `lm_head` is (P, D), its vocabulary padded to P; rows from `vocab_size` on do not exist.
    The logits are `softcap * tanh(h W^T / softcap)`. A weight of 0 ignores its token. Gradients
    flow to `hidden` and `lm_head`.
    """
    return _CrossEntropy.apply(hidden, lm_head, targets, weights, vocab_size, softcap)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        lm_head: Tensor,
        targets: Tensor,
        weights: Tensor,
        vocab_size: int,
        softcap: float,
    ) -> Tensor:
        matrix = lm_head[:vocab_size].to(hidden.dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        total = torch.zeros((), device=hidden.device)
        d_hidden, d_matrix = torch.empty_like(flat), torch.zeros_like(lm_head)
        chunks = (x.split(CHUNK_TOKENS) for x in (flat, d_hidden, targets.flatten()))
        for h, d_h, y, w in zip(*chunks, weights.flatten().split(CHUNK_TOKENS), strict=True):
            logits, squashed = _capped_logits(h, matrix, softcap)
            slope = 1 - squashed * squashed
            y = y.clamp(min=0)[:, None].long()
            log_probs = logits.log_softmax(dim=-1)
            total -= (w * log_probs.gather(1, y)[:, 0]).sum()
            d_logits = log_probs.exp_().scatter_add_(1, y, -torch.ones_like(w)[:, None])
            d_logits = d_logits.mul_(slope).mul_(w[:, None]).to(h.dtype)
            torch.mm(d_logits, matrix, out=d_h)
            d_matrix[:vocab_size] += d_logits.T @ h
        ctx.save_for_backward(d_hidden.reshape(hidden.shape), d_matrix)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        d_hidden, d_matrix = ctx.saved_tensors
        return (g * d_hidden).to(d_hidden.dtype), g * d_matrix, None, None, None, None


@torch.no_grad()
def token_scores(
    hidden: Float[Tensor, "B T D"],
    lm_head: Float[Tensor, "P D"],
    targets: Int[Tensor, "B T"],
    *,
    vocab_size: int,
    softcap: float,
) -> tuple[Float[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Nats of every target (0 where it is negative) and the most likely token at its place."""
    matrix = lm_head[:vocab_size].to(hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])
    nll, greedy = [], []
    for h, y in zip(flat.split(CHUNK_TOKENS), targets.flatten().split(CHUNK_TOKENS), strict=True):
        logits, _ = _capped_logits(h, matrix, softcap)
        nll.append(_nll(logits, y))
        greedy.append(logits.argmax(dim=-1))
    return torch.cat(nll).reshape(targets.shape), torch.cat(greedy).reshape(targets.shape)


def _capped_logits(
    h: Float[Tensor, "n D"], matrix: Float[Tensor, "V D"], softcap: float
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n V"]]:
    """Soft-capped float32 logits, and the same between -1 and 1."""
    squashed = product(h, matrix, torch.float32).div_(softcap).tanh_()
    return softcap * squashed, squashed


def _nll(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    ignore = -1
    clamped = targets.long().clamp(min=ignore)
    return F.cross_entropy(logits, clamped, ignore_index=ignore, reduction="none")
