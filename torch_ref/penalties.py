"""Penalties and biases on the device: `jaxchat.sampling.adjusted` in PyTorch, for all rows at once.

The twin of `jaxchat/penalties.py`: how often each token occurs is counted once at the start of a
dispatch, from the ids that the cache holds, and kept up to date token by token. Where no row asks
for anything, there is no tally at all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jaxchat.sampling_params import SamplingParams


class Tally(NamedTuple):
    """What S rows ask for, and what they hold by token."""

    presence: Float[Tensor, "S 1"]
    frequency: Float[Tensor, "S 1"]
    repetition: Float[Tensor, "S 1"]
    bias: Float[Tensor, "S V"]
    in_prompt: Bool[Tensor, "S V"]
    counts: Int[Tensor, "S V"]
    """How often the reply holds a token; `add` changes it in place."""


def tally(
    params: Sequence[SamplingParams | None],
    ids: Int[Tensor, "S L"],
    newest: Int[Tensor, " S"],
    lengths: Int[Tensor, " S"],
    prompt_lengths: Int[Tensor, " S"],
    vocab_size: int,
) -> Tally | None:
    """Count what the rows hold: the first `lengths` of `ids`, and `newest` behind them.

    None where no row asks for a penalty or a bias.
    """
    filled = [row or SamplingParams() for row in params]
    if not any(row.adjusts for row in filled):
        return None
    device, size = ids.device, len(filled)

    def column(values: list[float]) -> Float[Tensor, "S 1"]:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    bias = torch.zeros(size, vocab_size, dtype=torch.float32, device=device)
    for i, row in enumerate(filled):
        for token, value in row.logit_bias:
            bias[i, token] = value
    positions = torch.arange(ids.shape[1], device=device)[None]
    ends = lengths.clamp(max=ids.shape[1] - 1)  # an idle row may hold more than is looked at
    text = ids.scatter(1, ends[:, None], newest[:, None])
    prompt = positions < prompt_lengths[:, None]
    reply = (positions <= lengths[:, None]) & ~prompt
    counts, in_prompt = (
        torch.zeros(size, vocab_size, dtype=torch.int64, device=device).scatter_add_(
            1, text, mask.long()
        )
        for mask in (reply, prompt)
    )
    return Tally(
        presence=column([row.presence_penalty for row in filled]),
        frequency=column([row.frequency_penalty for row in filled]),
        repetition=column([row.repetition_penalty for row in filled]),
        bias=bias,
        in_prompt=in_prompt > 0,
        counts=counts,
    )


def add(seen: Tally | None, tokens: Int[Tensor, " S"], counted: Bool[Tensor, " S"]) -> None:
    """Count one more token in the rows that are `counted`."""
    if seen is not None:
        seen.counts.scatter_add_(1, tokens[:, None], counted.long()[:, None])


def adjust(logits: Float[Tensor, "S V"], seen: Tally | None) -> Float[Tensor, "S V"]:
    """The logits to choose from."""
    if seen is None:
        return logits
    known = seen.in_prompt | (seen.counts > 0)
    divided = torch.where(logits > 0, logits / seen.repetition, logits * seen.repetition)
    frequency = seen.frequency * seen.counts.float()
    presence = torch.where(seen.counts > 0, seen.presence, 0.0)
    return torch.where(known, divided, logits) - frequency - presence + seen.bias
