"""What a transformer remembers of the tokens it has read: a pytree of fixed-size arrays.

Rows are independent conversations of different lengths. Sizes never change, so one compiled step
serves every token; what lies beyond a row's length is garbage that the mask hides until it is
overwritten. A row may be rewound to any earlier length by setting `lengths`, because the cache
keeps the ids themselves: what smearing needs of the token before is looked up again. Keys and
values are stored (B, K, S, C): a decode step then reads them in the order in which it multiplies
them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from jaxchat.config import GPTConfig


class KVCache(NamedTuple):
    """Keys, values and ids of B rows of at most S tokens."""

    keys: tuple[Float[Array, "B K S C"], ...]
    """One array per layer: rotated, normed, gained."""
    values: tuple[Float[Array, "B K S C"], ...]
    """One array per layer, value embeddings included."""
    ids: Int[Array, "B 1 S 1"]
    """The tokens, shaped as keys of one head and one channel."""
    lengths: Int[Array, " B"]
    """Tokens each row holds."""

    @property
    def max_length(self) -> int:
        return self.ids.shape[2]


def make_cache(config: GPTConfig, rows: int, max_length: int, dtype: DTypeLike) -> KVCache:
    """An empty cache. Memory: 2 x n_layer x rows x n_kv_head x max_length x head_dim x itemsize."""
    shape = (rows, config.n_kv_head, max_length, config.head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer)),
        ids=jnp.zeros((rows, 1, max_length, 1), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
    )


def append(
    stored: Shaped[Array, "B K S C"],
    new: Shaped[Array, "B T K C"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> Shaped[Array, "B K S C"]:
    """Write the first `counts` of T new entries into every row from its own `starts` on.

    Nothing else changes: padding is sent to a position beyond the end, where writes are dropped.
    """
    entry = jnp.arange(new.shape[1])[None]
    slots = jnp.where(entry < counts[:, None], starts[:, None] + entry, stored.shape[2])  # (B, T)
    rows = jnp.arange(len(new))[:, None]
    return stored.at[rows, :, slots].set(new.astype(stored.dtype), mode="drop")


def newest_ids(cache: KVCache) -> Int[Array, " B"]:
    """The last token of every row; 0 in an empty one."""
    last = jnp.maximum(cache.lengths - 1, 0)[:, None]
    ids = jnp.take_along_axis(cache.ids[:, 0, :, 0], last, axis=1)[:, 0]
    return jnp.where(cache.lengths > 0, ids, 0)


def crop(cache: KVCache, max_length: int) -> KVCache:
    """The first `max_length` positions of every row, as a smaller cache."""
    keys, values, ids = jax.tree.map(lambda x: x[:, :, :max_length], tuple(cache[:3]))
    return KVCache(keys, values, ids, cache.lengths)


def paste(cache: KVCache, part: KVCache) -> KVCache:
    """Put what `crop` took out back in its place."""
    origin = (0, 0, 0, 0)
    keys, values, ids = jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice(x, y, origin), tuple(cache[:3]), tuple(part[:3])
    )
    return KVCache(keys, values, ids, part.lengths)


def read_row(
    cache: KVCache, row: Int[Array, ""], start: Int[Array, ""] | int, length: int
) -> KVCache:
    """`length` positions of one row as a cache of its own (B = 1)."""

    def take(x: Shaped[Array, "B K S C"]) -> Shaped[Array, "1 K _ C"]:
        return jax.lax.dynamic_slice(x, (row, 0, start, 0), (1, x.shape[1], length, x.shape[3]))

    keys, values, ids = jax.tree.map(take, tuple(cache[:3]))
    return KVCache(keys, values, ids, jax.lax.dynamic_slice_in_dim(cache.lengths, row, 1))


def write_row(
    cache: KVCache, row: Int[Array, ""], start: Int[Array, ""] | int, part: KVCache
) -> KVCache:
    """Put positions that `read_row` took out of a row back in their place."""
    keys, values, ids = jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice(x, y, (row, 0, start, 0)),
        tuple(cache[:3]),
        tuple(part[:3]),
    )
    lengths = jax.lax.dynamic_update_slice_in_dim(cache.lengths, part.lengths, row, axis=0)
    return KVCache(keys, values, ids, lengths)
