"""Penalties and biases on the device: `jaxchat.sampling.adjusted` in JAX, for all rows at once.

What penalties need to know of a text is how often each token occurs, and the cache already holds
every row's ids: they are counted once at the start of a dispatch and kept up to date token by
token. Where no row asks for anything, nothing is counted. `torch_ref/penalties.py` is the twin.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxchat.devices import on_host
from jaxchat.sampling_params import MAX_LOGIT_BIAS, SamplingParams

UNUSED = np.iinfo(np.int32).max
"""In place of a token where a row has fewer biases: beyond any vocabulary, so it is dropped."""


class Penalties(NamedTuple):
    """What S rows ask for."""

    asked: Bool[Array, ""]
    """Whether any row asks for anything."""
    presence: Float[Array, " S"]
    frequency: Float[Array, " S"]
    repetition: Float[Array, " S"]
    bias_ids: Int[Array, "S N"]
    biases: Float[Array, "S N"]


class Tally(NamedTuple):
    """What S rows hold, by token."""

    in_prompt: Bool[Array, "S V"]
    counts: Int[Array, "S V"]
    """How often the reply holds a token."""
    bias: Float[Array, "S V"]


def row_penalties(rows: Sequence[SamplingParams | None]) -> Penalties:
    """The penalties of every row as arrays of fixed shapes."""
    filled = [row or SamplingParams() for row in rows]
    bias_ids = np.full((len(rows), MAX_LOGIT_BIAS), UNUSED, np.int32)
    biases = np.zeros((len(rows), MAX_LOGIT_BIAS), np.float32)
    for i, row in enumerate(filled):
        if row.logit_bias:
            bias_ids[i, : len(row.logit_bias)], biases[i, : len(row.logit_bias)] = zip(
                *row.logit_bias, strict=True
            )
    return Penalties(
        on_host(any(row.adjusts for row in filled), bool),
        on_host([row.presence_penalty for row in filled], jnp.float32),
        on_host([row.frequency_penalty for row in filled], jnp.float32),
        on_host([row.repetition_penalty for row in filled], jnp.float32),
        on_host(bias_ids, jnp.int32),
        on_host(biases, jnp.float32),
    )


def tally(
    penalties: Penalties,
    ids: Int[Array, "S L"],
    newest: Int[Array, " S"],
    lengths: Int[Array, " S"],
    prompt_lengths: Int[Array, " S"],
    vocab_size: int,
) -> Tally:
    """Count what the rows hold: the first `lengths` of `ids`, and `newest` behind them."""
    rows = jnp.arange(len(ids))[:, None]
    shape = (len(ids), vocab_size)

    def count() -> Tally:
        positions = jnp.arange(ids.shape[1])[None]
        text = ids.at[rows[:, 0], lengths].set(newest)
        prompt = positions < prompt_lengths[:, None]
        reply = (positions <= lengths[:, None]) & ~prompt

        def those(mask: Bool[Array, "S L"]) -> Int[Array, "S L"]:
            return jnp.where(mask, text, UNUSED)

        return Tally(
            jnp.zeros(shape, bool).at[rows, those(prompt)].set(True, mode="drop"),
            jnp.zeros(shape, jnp.int32).at[rows, those(reply)].add(1, mode="drop"),
            jnp.zeros(shape).at[rows, penalties.bias_ids].add(penalties.biases, mode="drop"),
        )

    def nothing() -> Tally:
        return Tally(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))

    return jax.lax.cond(penalties.asked, count, nothing)


def add(seen: Tally, tokens: Int[Array, " S"], counted: Bool[Array, " S"]) -> Tally:
    """The tally after one more token in the rows that are `counted`."""
    rows = jnp.arange(len(tokens))
    return seen._replace(counts=seen.counts.at[rows, tokens].add(counted.astype(jnp.int32)))


def adjust(logits: Float[Array, "S V"], penalties: Penalties, seen: Tally) -> Float[Array, "S V"]:
    """The logits to choose from."""

    def adjusted() -> Float[Array, "S V"]:
        repetition = penalties.repetition[:, None]
        known = seen.in_prompt | (seen.counts > 0)
        divided = jnp.where(logits > 0, logits / repetition, logits * repetition)
        counts = seen.counts.astype(jnp.float32)
        frequency = penalties.frequency[:, None] * counts
        presence = jnp.where(seen.counts > 0, penalties.presence[:, None], 0)
        return jnp.where(known, divided, logits) - frequency - presence + seen.bias

    return jax.lax.cond(penalties.asked, adjusted, lambda: logits)
