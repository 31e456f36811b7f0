"""Logits to tokens, as plain numpy: the definition that every backend's sampler is held to.

Exactly one uniform number per row and position, drawn from a counter-based generator keyed by
(seed, row, position) and pushed through the inverse of the cumulative distribution. So a request
gives the same tokens whatever else is in the batch, and on both backends when their logits agree.
Greedy (temperature 0) is exact argmax, the lowest id on ties.

Filters keep every token that ties with the last one kept, so none depends on a sort's order.
"""

import numpy as np

from jaxchat.config import SamplingParams

_MASK = (1 << 64) - 1


def uniform(seed: int, row: int, position: int) -> np.float32:
    """A number in [0, 1) with 24 random bits: SplitMix64's finaliser over the three keys."""
    state = 0
    for key in (seed, row, position):
        state = _mix((state ^ key) + 0x9E3779B97F4A7C15 & _MASK)
    return np.float32(state >> 40) * np.float32(2**-24)


def sample(logits: np.ndarray, params: SamplingParams, uniform: np.float32) -> int:
    """One token from (V,) float32 logits: temperature, then top-k, top-p and min-p, then draw."""
    if params.temperature == 0:
        return int(np.argmax(logits))
    weights = filtered_weights(logits, params)
    cumulative = np.cumsum(weights, dtype=np.float32)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))


def filtered_weights(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Unnormalised probabilities (V,) float32 of the tokens that survive the filters, else 0.

    top-k acts on the logits; top-p and min-p act on the distribution that top-k leaves.
    """
    scaled = logits.astype(np.float32) / np.float32(params.temperature)
    weights = np.exp(scaled - scaled.max())
    if params.top_k and params.top_k < len(weights):
        weights = np.where(weights >= np.sort(weights)[-params.top_k], weights, np.float32(0))
    if params.top_p < 1:
        ordered = np.sort(weights)[::-1]
        mass = np.cumsum(ordered, dtype=np.float32)
        last = int(np.argmax(mass >= np.float32(params.top_p) * mass[-1]))
        weights = np.where(weights >= ordered[last], weights, np.float32(0))
    return np.where(weights >= np.float32(params.min_p), weights, np.float32(0))


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection with full avalanche."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
