"""Logits to tokens on the device, for all rows at once: `jaxchat.sampling.sample` in JAX.

Every row has its own parameters, as arrays, so that none of them recompiles anything. Thresholds
for top-k and top-p are found without a sort: the order of non-negative floats is the order of
their bits, so the largest threshold that still keeps enough tokens is found bit by bit. Tokens
that tie with the last one kept stay, as in the definition.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxchat.devices import on_host
from jaxchat.sampling import BLOCK, MIN_TEMPERATURE, MIN_TOP_P
from jaxchat.sampling_params import MAX_TOP_LOGPROBS, SamplingParams

BITS_OF_ONE = 30
"""Bits that the pattern of a float32 in [0, 1] needs: 1.0 is 0x3F800000 < 2 ** 30."""


class RowParams(NamedTuple):
    """The sampling parameters of S rows."""

    temperature: Float[Array, " S"]
    top_k: Int[Array, " S"]
    """0 keeps all."""
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]


def row_params(rows: Sequence[SamplingParams | None]) -> RowParams:
    """Parameters as arrays; rows without any are greedy, which costs least."""
    idle = SamplingParams(temperature=0.0)
    filled = [row or idle for row in rows]
    return RowParams(
        on_host(
            [row.temperature and max(row.temperature, MIN_TEMPERATURE) for row in filled],
            jnp.float32,
        ),
        on_host([row.top_k or 0 for row in filled], jnp.int32),
        on_host([max(row.top_p, MIN_TOP_P) for row in filled], jnp.float32),
        on_host([row.min_p for row in filled], jnp.float32),
    )


def sample(
    logits: Float[Array, "S V"], params: RowParams, uniforms: Float[Array, " S"]
) -> Int[Array, " S"]:
    """A token for every row."""
    greedy = _argmax(logits)
    sampled = params.temperature > 0
    return jax.lax.cond(
        sampled.any(),
        lambda: jnp.where(sampled, _draw(filtered_weights(logits, params), uniforms), greedy),
        lambda: greedy,
    )


def logprob(logits: Float[Array, "S V"], tokens: Int[Array, " S"]) -> Float[Array, " S"]:
    """Log-probabilities of one token per row."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def alternatives(
    logits: Float[Array, "S V"], asked: Bool[Array, ""]
) -> tuple[Int[Array, "S K"], Float[Array, "S K"]]:
    """The likeliest tokens of every row and their log-probabilities; zeros unless `asked`."""
    count = min(MAX_TOP_LOGPROBS, logits.shape[-1])

    def find() -> tuple[Array, Array]:
        best, ids = jax.lax.top_k(logits, count)
        return ids, best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    def nothing() -> tuple[Array, Array]:
        return jnp.zeros((len(logits), count), jnp.int32), jnp.zeros((len(logits), count))

    return jax.lax.cond(asked, find, nothing)


def _argmax(logits: Float[Array, "S V"]) -> Int[Array, " S"]:
    """The lowest id with the highest logit, as two plain reductions: XLA on CPU runs them 5x faster
    than `jnp.argmax`."""
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    best = logits >= logits.max(axis=-1, keepdims=True)
    return jnp.where(best, ids, logits.shape[-1] - 1).min(axis=-1)


def filtered_weights(logits: Float[Array, "S V"], params: RowParams) -> Float[Array, "S V"]:
    """Unnormalised probabilities of the tokens that survive the filters, else 0."""
    temperature = jnp.where(params.temperature > 0, params.temperature, jnp.float32(1))
    below_best = logits - logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(below_best / temperature[:, None])
    vocab = logits.shape[-1]
    with_k = (params.top_k > 0) & (params.top_k < vocab) & (params.temperature > 0)
    wanted = jnp.where(with_k, params.top_k, 0).astype(jnp.float32)
    weights = _keep_most(weights, jnp.ones_like(weights), wanted)
    with_p = (params.top_p < 1) & (params.temperature > 0)
    mass = params.top_p * weights.sum(axis=-1)
    weights = _keep_most(weights, weights, jnp.where(with_p, mass, 0))
    return jnp.where(weights >= params.min_p[:, None], weights, 0)


def _keep_most(
    weights: Float[Array, "S V"], measures: Float[Array, "S V"], wanted: Float[Array, " S"]
) -> Float[Array, "S V"]:
    """Zero all but the largest weights whose measures sum to `wanted`; 0 keeps all.

    The threshold is the largest float t in [0, 1] with sum(measures[weights >= t]) >= wanted,
    built from its highest bit down. Where no row wants anything, no step is run.
    """

    def settle_bit(i: Int[Array, ""], bits: Int[Array, " S"]) -> Int[Array, " S"]:
        higher = bits | (jnp.int32(1) << (BITS_OF_ONE - 1 - i))
        threshold = jax.lax.bitcast_convert_type(higher, jnp.float32)
        kept = jnp.where(weights >= threshold[:, None], measures, 0).sum(axis=-1)
        return jnp.where(kept >= wanted, higher, bits)

    steps = jnp.where((wanted > 0).any(), BITS_OF_ONE, 0)
    bits = jax.lax.fori_loop(0, steps, settle_bit, jnp.zeros(len(weights), jnp.int32))
    threshold = jax.lax.bitcast_convert_type(jnp.where(wanted > 0, bits, 0), jnp.float32)
    return jnp.where(weights >= threshold[:, None], weights, 0)


def _draw(weights: Float[Array, "S V"], uniforms: Float[Array, " S"]) -> Int[Array, " S"]:
    """Invert the cumulative distribution: first the block, then the token inside it."""
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)
    sums = blocks.sum(axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniforms * ends[:, -1]
    block = _first_above(target, ends, sums)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # (S, BLOCK)
    before = jnp.take_along_axis(ends - sums, block[:, None], axis=1)
    token = _first_above(target, before + jnp.cumsum(inside, axis=-1), inside)
    return block * BLOCK + token


def _first_above(
    target: Float[Array, " S"], ends: Float[Array, "S N"], weights: Float[Array, "S N"]
) -> Int[Array, " S"]:
    """Index of the first end above the target; where rounding leaves none, the last.

    Only positions with weight count: rounding never lets a filtered token through.
    """
    candidates = weights > 0
    above = candidates & (ends > target[:, None])
    first = jnp.argmax(above, axis=-1)
    last = ends.shape[1] - 1 - jnp.argmax(candidates[:, ::-1], axis=-1)
    return jnp.where(above.any(axis=-1), first, last).astype(jnp.int32)
