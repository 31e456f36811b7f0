"""What a transformer remembers of the tokens it has read: a pytree of fixed-size arrays.

Rows are independent conversations of different lengths. Sizes never change, so one compiled step
serves every token; what lies beyond a row's length is garbage that the mask hides until it is
overwritten. Keys and values are stored (B, K, S, C): a decode step then reads them in the order in
which it multiplies them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxchat.config import GPTConfig


class KVCache(NamedTuple):
    """Keys, values and the last embedding of B rows of at most S tokens."""

    keys: tuple[Float[Array, "B K S C"], ...]
    """One array per layer: rotated, normed, gained."""
    values: tuple[Float[Array, "B K S C"], ...]
    """One array per layer, value embeddings included."""
    last_embedding: Float[Array, "B D"]
    """The newest token's normed embedding before smearing: the next token's smear needs it."""
    lengths: Int[Array, " B"]
    """Tokens each row holds."""

    @property
    def max_length(self) -> int:
        return self.keys[0].shape[2]


def make_cache(config: GPTConfig, rows: int, max_length: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache. Memory: 2 x n_layer x rows x n_kv_head x max_length x head_dim x itemsize."""
    shape = (rows, config.n_kv_head, max_length, config.head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer)),
        last_embedding=jnp.zeros((rows, config.n_embd), dtype),
        lengths=jnp.zeros(rows, jnp.int32),
    )


def append(
    stored: Float[Array, "B K S C"], new: Float[Array, "B T K C"], starts: Int[Array, " B"]
) -> Float[Array, "B K S C"]:
    """Write T new entries into every row from its own `starts` on."""

    def write(row: Array, entries: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, entries, start, axis=1)

    return jax.vmap(write)(stored, jnp.swapaxes(new, 1, 2).astype(stored.dtype), starts)


def read_row(cache: KVCache, row: Int[Array, ""]) -> KVCache:
    """One row as a cache of its own (B = 1)."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0), cache)


def write_row(cache: KVCache, row: Int[Array, ""], part: KVCache) -> KVCache:
    """Put a row that `read_row` took out back in its place."""
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, row, axis=0), cache, part
    )
