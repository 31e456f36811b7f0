"""Logits to tokens on the device, for all rows at once: `jaxchat.sampling.sample` in PyTorch.

The twin of `jaxchat/device_sampling.py`. Thresholds for top-k and top-p come from `topk` and `sort`
here, which an eager backend runs only where a row asks for them; tokens that tie with the last one
kept stay, as in the definition.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jaxchat.sampling import BLOCK, MIN_TEMPERATURE, MIN_TOP_P
from jaxchat.sampling_params import MAX_TOP_LOGPROBS, SamplingParams


class RowParams(NamedTuple):
    """The sampling parameters of S rows, and what the host knows of them without asking."""

    sampled: Bool[Tensor, " S"]
    """False where a row is greedy."""
    temperature: Float[Tensor, "S 1"]
    top_k: Int[Tensor, "S 1"]
    """0 keeps all."""
    top_p: Float[Tensor, "S 1"]
    min_p: Float[Tensor, "S 1"]
    any_sampled: bool
    most_top_k: int
    any_top_p: bool


def row_params(rows: Sequence[SamplingParams | None], device: torch.device) -> RowParams:
    """Parameters as tensors; rows without any are greedy, which costs least."""
    idle = SamplingParams(temperature=0.0)
    filled = [row or idle for row in rows]

    def column(values: list[float]) -> Float[Tensor, "S 1"]:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    return RowParams(
        sampled=torch.tensor([row.temperature > 0 for row in filled], device=device),
        temperature=column([max(row.temperature or 1.0, MIN_TEMPERATURE) for row in filled]),
        top_k=torch.tensor([row.top_k or 0 for row in filled], device=device)[:, None],
        top_p=column([max(row.top_p, MIN_TOP_P) for row in filled]),
        min_p=column([row.min_p for row in filled]),
        any_sampled=any(row.temperature > 0 for row in filled),
        most_top_k=max(row.top_k or 0 for row in filled),
        any_top_p=any(row.top_p < 1 for row in filled),
    )


def sample(
    logits: Float[Tensor, "S V"], params: RowParams, uniforms: Float[Tensor, " S"]
) -> Int[Tensor, " S"]:
    """A token for every row."""
    tokens = logits.argmax(dim=-1)
    if params.any_sampled:
        drawn = _draw(filtered_weights(logits, params), uniforms)
        tokens = torch.where(params.sampled, drawn, tokens)
    return tokens


def logprob(logits: Float[Tensor, "S V"], tokens: Int[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Log-probabilities of one token per row."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)


def alternatives(
    logits: Float[Tensor, "S V"],
) -> tuple[Int[Tensor, "S K"], Float[Tensor, "S K"]]:
    """The likeliest tokens of every row, the lowest id first on ties, and their log-probabilities.

    `topk` promises no order among equals.
    """
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    best, ids = (x[:, :MAX_TOP_LOGPROBS] for x in ordered)
    return ids, best - logits.logsumexp(dim=-1, keepdim=True)


def filtered_weights(logits: Float[Tensor, "S V"], params: RowParams) -> Float[Tensor, "S V"]:
    """Unnormalised probabilities of the tokens that survive the filters, else 0."""
    below_best = logits - logits.amax(dim=-1, keepdim=True)
    weights = (below_best / params.temperature).exp()
    most = min(params.most_top_k, weights.shape[1])
    if most:
        best = weights.topk(most, dim=-1).values
        least = best.gather(1, (params.top_k - 1).clamp(0, most - 1))
        weights = weights.masked_fill((params.top_k > 0) & (weights < least), 0.0)
    if params.any_top_p:
        ordered = weights.sort(dim=-1, descending=True).values
        mass = ordered.cumsum(dim=-1)
        last = (mass < params.top_p * mass[:, -1:]).sum(dim=-1, keepdim=True)
        weights = weights.masked_fill((params.top_p < 1) & (weights < ordered.gather(1, last)), 0.0)
    return weights.masked_fill(weights < params.min_p, 0.0)


def _draw(weights: Float[Tensor, "S V"], uniforms: Float[Tensor, " S"]) -> Int[Tensor, " S"]:
    """Invert the cumulative distribution: first the block, then the token inside it."""
    rows, vocab = weights.shape
    blocks = F.pad(weights, (0, -vocab % BLOCK)).reshape(rows, -1, BLOCK)
    sums = blocks.sum(dim=-1)
    ends = sums.cumsum(dim=-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = _first_above(target, ends, sums)
    inside = blocks[torch.arange(rows, device=weights.device), block]  # (S, BLOCK)
    before = (ends - sums).gather(1, block[:, None])
    return block * BLOCK + _first_above(target, before + inside.cumsum(dim=-1), inside)


def _first_above(
    target: Float[Tensor, "S 1"], ends: Float[Tensor, "S N"], weights: Float[Tensor, "S N"]
) -> Int[Tensor, " S"]:
    """Index of the first end above the target; where rounding leaves none, the last.

    Only positions with weight count: rounding never lets a filtered token through.
    """
    count = ends.shape[1]
    index, candidates = torch.arange(count, device=ends.device), weights > 0
    first = torch.where(candidates & (ends > target), index, count).amin(dim=-1)
    last = torch.where(candidates, index, 0).amax(dim=-1)
    return torch.where(first < count, first, last)
