"""Logits to tokens, as plain numpy: the definition that every backend's sampler is held to.

Exactly one uniform number per row and position, drawn from a counter-based generator keyed by
(seed, row, position) and pushed through the inverse of the cumulative distribution. So a request
gives the same tokens whatever else is in the batch, and on both backends when their logits agree.
Greedy (temperature 0) is exact argmax, the lowest id on ties.

Penalties and biases (`adjusted`) change the logits first; log-probabilities are always those of
the model, before all of it. Filters keep every token that ties with the last one kept, so none
depends on a sort's order. Sums are taken over blocks of `BLOCK` tokens and then over the blocks:
the rounding error of 32768 float32 terms stays below 1e-6, and a device need not scan a whole
vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxchat.sampling_params import SamplingParams

BLOCK = 128
"""Tokens per block of the cumulative distribution."""

MIN_TEMPERATURE = 1e-30
"""Lower ones count as this: division by a denormal float32 is undefined on some devices."""

MIN_TOP_P = 1e-30
"""Lower ones count as this, for the same reason; both keep the best token alone."""


class History(NamedTuple):
    """The text so far, which penalties look at."""

    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()


def uniform(seed: int, row: int, position: int) -> np.float32:
    """A number in [0, 1) with 24 random bits: SplitMix64's finaliser over the three keys."""
    return uniforms(seed, row, position, 1)[0]


def uniforms(seed: int, row: int, position: int, count: int) -> np.ndarray:
    """(count,) float32: the numbers of `position` and the `count` - 1 positions after it."""
    state = np.zeros(count, np.uint64)
    for key in (seed, row, position + np.arange(count)):
        state = _mix((state ^ np.asarray(key, np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def sample(
    logits: np.ndarray,
    params: SamplingParams,
    uniform: np.float32,
    history: History = History(),  # noqa: B008 (immutable)
) -> int:
    """One token from (V,) float32 logits: penalties, temperature, top-k, top-p, min-p, draw."""
    logits = adjusted(logits, params, history)
    if params.temperature == 0:
        return int(np.argmax(logits))
    weights = filtered_weights(logits, params)
    blocks = np.pad(weights, (0, -len(weights) % BLOCK)).reshape(-1, BLOCK)
    sums = blocks.sum(axis=1)
    ends = np.cumsum(sums)
    target = uniform * ends[-1]
    block = _first_above(target, ends, sums)
    before = ends[block] - sums[block]
    token = _first_above(target, before + np.cumsum(blocks[block]), blocks[block])
    return block * BLOCK + token


def adjusted(logits: np.ndarray, params: SamplingParams, history: History) -> np.ndarray:
    """The logits after repetition, frequency and presence penalty and bias, in this order.

    Repetition counts what the prompt holds too, the others only the reply (as OpenAI and vLLM do).
    """
    if not params.adjusts:
        return logits
    logits = logits.astype(np.float32)
    known = sorted({*history.prompt, *history.generated})
    repetition = np.float32(params.repetition_penalty)
    before = logits[known]
    logits[known] = np.where(before > 0, before / repetition, before * repetition)
    for token, count in Counter(history.generated).items():
        logits[token] -= np.float32(params.frequency_penalty) * np.float32(count)
        logits[token] -= np.float32(params.presence_penalty)
    for token, bias in params.logit_bias:
        logits[token] += np.float32(bias)
    return logits


def logprob(logits: np.ndarray, token: int) -> float:
    """Log-probability of a token without temperature and filters."""
    return float(_log_softmax(logits)[token])


def alternatives(logits: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens and their log-probabilities, the lowest id first on ties."""
    if not count:
        return ()
    likely = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    best = likely[np.argsort(-logits[likely], kind="stable")][:count]
    return tuple(zip(best.tolist(), _log_softmax(logits)[best].tolist(), strict=True))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """(V,) float32."""
    shifted = logits.astype(np.float32) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def filtered_weights(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Unnormalised probabilities (V,) float32 of the tokens that survive the filters, else 0.

    top-k acts on the logits; top-p and min-p act on the distribution that top-k leaves.
    """
    below_best = logits.astype(np.float32) - np.float32(logits.max())
    weights = np.exp(below_best / np.float32(max(params.temperature, MIN_TEMPERATURE)))
    if params.top_k and params.top_k < len(weights):
        least = np.partition(weights, -params.top_k)[-params.top_k]
        weights = np.where(weights >= least, weights, np.float32(0))
    top_p = np.float32(max(params.top_p, MIN_TOP_P))
    if top_p < 1:
        ordered = np.sort(weights)[::-1]
        mass = np.cumsum(ordered, dtype=np.float32)
        last = int(np.argmax(mass >= top_p * mass[-1]))
        weights = np.where(weights >= ordered[last], weights, np.float32(0))
    return np.where(weights >= np.float32(params.min_p), weights, np.float32(0))


def _first_above(target: np.float32, ends: np.ndarray, weights: np.ndarray) -> int:
    """Index of the first end above the target; where rounding leaves none, the last.

    Only positions with weight count: rounding never lets a filtered token through.
    """
    candidates = np.flatnonzero(weights)
    above = candidates[ends[candidates] > target]
    return int(above[0] if len(above) else candidates[-1])


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
