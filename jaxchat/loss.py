"""Cross-entropy that never holds (B, T, V): the tokens are cut into chunks.

`cross_entropy` computes its own gradient while it computes the loss, chunk by chunk, because the
logits are at hand exactly once: half the time of the plain form at (8, 512, 256) and a vocabulary
of 8192 on two cores (LOG.md), and no logits in memory. It runs on the rows of one device, so its
chunks are runs of tokens. `token_scores` is the evaluation form: per-token losses and argmax, no
gradient. It sees rows of all devices, so its chunks cut time and keep every row where it is.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

LOGITS_BYTES = {"cpu": 2**23}
"""Size of the float32 logits that exist at the same time, by platform: on a CPU they stay in its
cache, 256 tokens of 8192."""

LOGITS_BYTES_ELSEWHERE = 2**29
"""Accelerators want large products: 4096 tokens of 32768."""

LEAST_CHUNK_TOKENS = 128
"""Below this the products themselves become slow."""


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Float[Array, "B T D"],
    lm_head: Float[Array, "P D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    vocab_size: int,
    softcap: float,
) -> Float[Array, ""]:
    """Sum over tokens of `weights` times the nats of `targets`, in float32.

    `lm_head` is (P, D), its vocabulary padded to P; columns from `vocab_size` on do not exist.
    The logits are `softcap * tanh(h W^T / softcap)`. A weight of 0 ignores its token. Gradients
    flow to `hidden` and `lm_head`.
    """
    matrix = lm_head.astype(hidden.dtype)

    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, y, w = chunk
        logits, _ = _capped(_products(h, matrix), vocab_size, softcap)
        return total + jnp.sum(w * _nll(logits, y)), None

    chunks = _flat_chunks(len(lm_head), hidden, targets, weights)
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)[0]


def _forward(
    hidden: Array, lm_head: Array, targets: Array, weights: Array, vocab_size: int, softcap: float
) -> tuple[Array, tuple[Array, Array]]:
    matrix = lm_head.astype(hidden.dtype)

    def add(carry: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple:
        total, d_transposed = carry
        h, y, w = chunk
        raw = _products(h, matrix)
        logits, _ = _capped(raw, vocab_size, softcap)
        mass = jnp.sum(jnp.exp(logits), axis=-1)  # the cap bounds them: no maximum to subtract
        nll = jnp.log(mass) - _picked(logits, y)
        raw, mass = _stored(raw, mass)
        logits, slope = _capped(raw, vocab_size, softcap)
        here = _vocabulary(logits) == y[:, None]
        share = jnp.exp(logits) * (w / mass)[:, None]
        d_logits = (share - jnp.where(here, w[:, None], 0.0)) * slope
        d_logits = d_logits.astype(h.dtype)
        d_hidden = d_logits @ matrix
        d_chunk = jnp.matmul(h.T, d_logits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(w * nll), d_transposed + d_chunk), d_hidden

    # (D, P): of both factors of a product with a transposed one, the small one is transposed
    start = (jnp.zeros((), jnp.float32), jnp.zeros(lm_head.shape[::-1], jnp.float32))
    (total, d_transposed), d_hidden = jax.lax.scan(
        add, start, _flat_chunks(len(lm_head), hidden, targets, weights)
    )
    d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: targets.size]
    return total, (d_hidden.reshape(hidden.shape), d_transposed.T)


def _backward(vocab_size: int, softcap: float, saved: tuple[Array, Array], g: Array) -> tuple:
    del vocab_size, softcap
    d_hidden, d_matrix = saved
    return (g.astype(d_hidden.dtype) * d_hidden, g * d_matrix, None, None)


cross_entropy.defvjp(_forward, _backward)


def token_scores(
    hidden: Float[Array, "B T D"],
    lm_head: Float[Array, "P D"],
    targets: Int[Array, "B T"],
    *,
    vocab_size: int,
    softcap: float,
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Nats of every target (0 where it is negative) and the most likely token at its place."""
    matrix = lm_head.astype(hidden.dtype)

    def score(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        h, y = chunk
        logits, _ = _capped(_products(h, matrix), vocab_size, softcap)
        return jnp.where(y < 0, 0.0, _nll(logits, y)), jnp.argmax(logits, axis=-1)

    nll, greedy = jax.lax.map(score, _time_chunks(len(lm_head), hidden, targets))

    def restore(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(len(targets), -1)[:, : targets.shape[1]]

    return restore(nll), restore(greedy).astype(jnp.int32)


def _products(h: Float[Array, "*B D"], matrix: Float[Array, "P D"]) -> Float[Array, "*B P"]:
    """Float32 logits before the cap."""
    raw = jnp.einsum("...d,vd->...v", h, matrix, preferred_element_type=jnp.float32)
    return _stored(raw)[0]


def _stored(*arrays: Array) -> tuple[Array, ...]:
    """What a GPU is to read from memory whenever it is needed.

    XLA would compute the capped logits once and store them beside the others: 8 of the 46 ms that
    the loss takes in a step of d12 on an H200. On a CPU that is the better way.
    """
    return jax.lax.optimization_barrier(arrays) if jax.default_backend() == "gpu" else arrays


def _capped(
    raw: Float[Array, "*B P"], vocab_size: int, softcap: float
) -> tuple[Float[Array, "*B P"], Float[Array, "*B P"]]:
    """Soft-capped logits, -inf on padding, and the derivative of the cap."""
    squashed = _tanh(raw / softcap)
    logits, slope = softcap * squashed, 1 - squashed * squashed
    if vocab_size < raw.shape[-1]:
        logits = jnp.where(_vocabulary(logits) < vocab_size, logits, -jnp.inf)
    return logits, slope


def _tanh(x: Array) -> Array:
    """On a GPU by functions that are instructions there, within 1e-6."""
    if jax.default_backend() == "gpu":
        return 1 - 2 * jnp.square(jax.lax.rsqrt(1 + jnp.exp(2 * x)))
    return jnp.tanh(x)


def _vocabulary(logits: Float[Array, "*B P"]) -> Int[Array, "*B P"]:
    """The token id of every logit."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _nll(logits: Float[Array, "*B P"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    return jax.nn.logsumexp(logits, axis=-1) - _picked(logits, targets)


def _picked(logits: Float[Array, "*B P"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The logit of every target; of the first token where the target is ignored."""
    return jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]


def _flat_chunks(vocab: int, *arrays: Array) -> Any:
    """Cut (B, T, ...) into (N, B*T/N, ...): runs of tokens in reading order."""
    tokens = math.prod(arrays[0].shape[:2])
    count = _count(tokens, vocab, tokens)
    return tuple(x[0] for x in (_cut(x.reshape(1, tokens, *x.shape[2:]), count) for x in arrays))


def _time_chunks(vocab: int, *arrays: Array) -> Any:
    """Cut (B, T, ...) into (N, B, T/N, ...), which keeps the rows, and with them their devices."""
    rows, length = arrays[0].shape[:2]
    count = _count(rows * length, vocab, length)
    return tuple(jnp.moveaxis(_cut(x, count), 1, 0) for x in arrays)


def _cut(x: Shaped[Array, "B T ..."], count: int) -> Shaped[Array, "B N _ ..."]:
    """Cut time into equal parts, the last of them filled up with zeros."""
    rows, length, *rest = x.shape
    size = -(-length // count)
    padding = [(0, 0), (0, count * size - length), *[(0, 0)] * len(rest)]
    return jnp.pad(x, padding).reshape(rows, count, size, *rest)


def _count(tokens: int, vocab: int, length: int) -> int:
    """How many chunks of logits of the right size; at most `length`."""
    most_bytes = LOGITS_BYTES.get(jax.default_backend(), LOGITS_BYTES_ELSEWHERE)
    chunk_tokens = max(LEAST_CHUNK_TOKENS, most_bytes // (4 * vocab))
    return min(length, max(1, -(-tokens // chunk_tokens)))
