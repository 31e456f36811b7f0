"""What a transformer remembers of the tokens it has read: a pytree of fixed-size arrays.

Rows are independent conversations of different lengths. Sizes never change, so one compiled step
serves every token; what lies beyond a row's length is garbage that the mask hides until it is
overwritten. A row may be rewound to any earlier length by setting `lengths`, because the cache
keeps the ids themselves: what smearing needs of the token before is looked up again. Keys and
values are stored (B, K, S, C): a decode step then reads them in the order in which it multiplies
them.

Two kinds: `KVCache` is the memory itself, which a prefill writes into; `Dispatch` is what several
decode steps in a row see of it and add to it. The model takes either.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxchat.attention import Heads, KVHeads, attend_pieces, cached_attention
from jaxchat.config import GPTConfig

Layer: TypeAlias = tuple[Float[Array, "B K _ C"], Float[Array, "B K _ C"]]
"""Keys and values of one layer."""


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

    def attend(
        self, layer: int, q: Heads, k: KVHeads, v: KVHeads, valid: Int[Array, " B"], window: int
    ) -> tuple[Heads, Layer]:
        """What queries find when their own keys and values are there too; and the layer with these.

        Row b's queries continue it at `lengths[b]`; the first `valid[b]` of them are stored.
        """
        keys = append(self.keys[layer], k, self.lengths, valid)
        values = append(self.values[layer], v, self.lengths, valid)
        positions = self.lengths[:, None] + jnp.arange(q.shape[1])[None]
        return cached_attention(q, keys, values, positions, window=window), (keys, values)

    def advance(
        self, layers: Sequence[Layer], ids: Int[Array, "B T"], valid: Int[Array, " B"]
    ) -> "KVCache":
        """The cache after a step: new layers, the ids they are of, and lengths."""
        keys, values = zip(*layers, strict=True)
        held = append(self.ids, ids[:, :, None, None], self.lengths, valid)
        return KVCache(keys, values, held, self.lengths + valid)

    def newest_ids(self) -> Int[Array, " B"]:
        """The last token of every row; 0 in an empty one."""
        last = jnp.maximum(self.lengths - 1, 0)[:, None]
        ids = jnp.take_along_axis(self.ids[:, 0, :, 0], last, axis=1)[:, 0]
        return jnp.where(self.lengths > 0, ids, 0)


class Dispatch(NamedTuple):
    """A cache during up to N decode steps: what the rows held before is only read, what they gain
    stands in columns of its own, step i's in column i.

    The large arrays are thus constants of the loop, of which short layers see no more than their
    window. Written at every step they were copied at every step (by XLA on a CPU, four times for
    one row), and every layer read all of them. A row that has stopped never runs again in the same
    dispatch, so its columns are valid up to its length and garbage behind.
    """

    held: tuple[Layer, ...]
    """Of each layer the last positions that the rows held, as many as its window can see; keys as
    (B, K, C, W), so that a query times these reads them in order."""
    firsts: tuple[Int[Array, " B"], ...]
    """The position of the first of them."""
    starts: Int[Array, " B"]
    """Tokens each row held."""
    gained: tuple[Layer, ...]
    """(B, K, N, C): keys and values of the tokens since."""
    ids: Int[Array, "B N"]
    """These tokens."""
    lengths: Int[Array, " B"]
    """Tokens each row holds now."""
    newest: Int[Array, " B"]
    """The last token of every row; 0 in an empty one."""
    step: Int[Array, ""]

    def attend(
        self, layer: int, q: Heads, k: KVHeads, v: KVHeads, valid: Int[Array, " B"], window: int
    ) -> tuple[Heads, Layer]:
        """As `KVCache.attend`, for one query per row."""
        del valid  # a row that does not run keeps its length, which hides what it writes
        (turned, held_values), first = self.held[layer], self.firsts[layer]
        held = (jnp.swapaxes(turned, 2, 3), held_values)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(x, jnp.swapaxes(new, 1, 2), self.step, axis=2)
            for x, new in zip(self.gained[layer], (k, v), strict=True)
        )
        old = first[:, None] + jnp.arange(held[0].shape[2])[None]  # (B, W)
        new = self.starts[:, None] + jnp.arange(keys.shape[2])[None]  # (B, N)
        before = (old < self.starts[:, None])[:, None, None]

        def visible(positions: Int[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
            behind = (self.lengths[:, None] - positions)[:, None, None]
            return (behind >= 0) & (behind <= window)

        pieces = [(*held, visible(old) & before), (keys, values, visible(new))]
        return attend_pieces(q, pieces), (keys, values)

    def advance(
        self, layers: Sequence[Layer], ids: Int[Array, "B 1"], valid: Int[Array, " B"]
    ) -> "Dispatch":
        """The cache after a step."""
        written = jax.lax.dynamic_update_slice_in_dim(self.ids, ids, self.step, axis=1)
        return self._replace(
            gained=tuple(layers),
            ids=written,
            lengths=self.lengths + valid,
            newest=jnp.where(valid > 0, ids[:, 0], self.newest),
            step=self.step + 1,
        )

    def newest_ids(self) -> Int[Array, " B"]:
        """The last token of every row; 0 in an empty one."""
        return self.newest


AnyCache: TypeAlias = KVCache | Dispatch


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


def begin_dispatch(
    cache: KVCache, lengths: Int[Array, " B"], windows: Sequence[int], *, bucket: int, steps: int
) -> Dispatch:
    """What up to `steps` decode steps see of rows that hold `lengths` tokens, `bucket` at most.

    `windows` has one entry per layer.
    """
    held, firsts = [], []
    for keys, values, window in zip(cache.keys, cache.values, windows, strict=True):
        width = min(window, bucket)
        first = jnp.maximum(lengths - width, 0) if width < bucket else jnp.zeros_like(lengths)
        # without the barrier XLA would turn them in every step
        turned = jax.lax.optimization_barrier(jnp.swapaxes(_last(keys, first, width), 2, 3))
        held.append((turned, _last(values, first, width)))
        firsts.append(first)
    rows, heads, _, channels = cache.keys[0].shape
    columns = jnp.zeros((rows, heads, steps, channels), cache.keys[0].dtype)
    return Dispatch(
        held=tuple(held),
        firsts=tuple(firsts),
        starts=lengths,
        gained=tuple((columns, columns) for _ in windows),
        ids=jnp.zeros((rows, steps), jnp.int32),
        lengths=lengths,
        newest=cache._replace(lengths=lengths).newest_ids(),
        step=jnp.int32(0),
    )


def _last(
    stored: Float[Array, "B K S C"], firsts: Int[Array, " B"], width: int
) -> Float[Array, "B K W C"]:
    """`width` positions of every row from its own first on."""
    if width == stored.shape[2]:
        return stored

    def take(row: Float[Array, "K S C"], first: Int[Array, ""]) -> Float[Array, "K W C"]:
        return jax.lax.dynamic_slice_in_dim(row, first, width, axis=1)

    return jax.vmap(take)(stored, firsts)


class Gains(NamedTuple):
    """What a dispatch has added to a cache."""

    layers: tuple[Layer, ...]
    ids: Int[Array, "B N"]
    starts: Int[Array, " B"]
    counts: Int[Array, " B"]


def gains(dispatch: Dispatch) -> Gains:
    """What is to be kept of a dispatch."""
    counts = dispatch.lengths - dispatch.starts
    return Gains(dispatch.gained, dispatch.ids, dispatch.starts, counts)


def keep(cache: KVCache, gains: Gains) -> KVCache:
    """The cache after a dispatch."""
    layers, ids, starts, counts = gains

    def put(
        stored: Shaped[Array, "B K S C"], new: Shaped[Array, "B K N C"]
    ) -> Shaped[Array, "B K S C"]:
        return append(stored, jnp.swapaxes(new, 1, 2), starts, counts)

    keys, values = zip(*layers, strict=True)
    return KVCache(
        tuple(map(put, cache.keys, keys)),
        tuple(map(put, cache.values, values)),
        put(cache.ids, ids[:, None, :, None]),
        starts + counts,
    )


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
