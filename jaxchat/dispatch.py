"""One dispatch of decoding: slots in, arrays for the backend out, and what comes back."""

from collections.abc import Sequence

import numpy as np

from jaxchat import sampling
from jaxchat.backend import DecodeBatch, DecodeResult
from jaxchat.request import Alternatives
from jaxchat.sampling_params import SamplingParams
from jaxchat.slots import Slot


def make_batch(
    rows: int,
    active: Sequence[tuple[Slot, int]],
    *,
    steps: int,
    stop_ids: frozenset[int],
    invariant: bool = False,
) -> DecodeBatch:
    """The slots that decode, each with the most tokens it may get, as `rows` rows of `steps`."""
    tokens, lengths, budgets, prompt_lengths = (np.zeros(rows, np.int32) for _ in range(4))
    uniforms = np.zeros((rows, steps), np.float32)
    params: list[SamplingParams | None] = [None] * rows
    for slot, budget in active:
        sample, i = slot.sample, slot.index
        assert sample is not None
        (tokens[i],), lengths[i] = slot.pending, len(slot.held)
        prompt_lengths[i], budgets[i] = len(sample.prompt.ids), budget
        seed = sample.request.params.seed
        uniforms[i] = sampling.uniforms(seed, sample.row, sample.length, steps)
        params[i] = sample.request.params
    return DecodeBatch(
        tokens, lengths, budgets, uniforms, prompt_lengths, tuple(params), stop_ids, invariant
    )


def alternatives(result: DecodeResult, row: int, steps: int, count: int) -> list[Alternatives]:
    """The `count` likeliest tokens at each of the `steps` that a row took."""
    if not count:
        return [()] * steps
    assert result.top_ids is not None and result.top_logprobs is not None
    ids = result.top_ids[row, :steps, :count].tolist()
    logprobs = result.top_logprobs[row, :steps, :count].tolist()
    return [tuple(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
