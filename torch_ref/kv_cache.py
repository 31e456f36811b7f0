"""What a transformer remembers of the tokens it has read: tensors of fixed size.

Rows are independent conversations of different lengths; what lies beyond a row's length is garbage
that the mask hides until it is overwritten. A row may be rewound to any earlier length by setting
`lengths`, because the cache keeps the ids themselves. The layout is `jaxchat/kv_cache.py`'s,
(B, K, S, C). The trick that JAX lacks: tensors are views, so `append` writes in place and
`read_rows` copies nothing, and a step can work on the used corner of a large cache.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from jaxchat.config import GPTConfig
from torch_ref.attention import Heads, KVHeads, cached_attention


class KVCache(NamedTuple):
    """Keys, values and ids of B rows of at most S tokens."""

    keys: tuple[Float[Tensor, "B K S C"], ...]
    """One tensor per layer: rotated, normed, gained."""
    values: tuple[Float[Tensor, "B K S C"], ...]
    """One tensor per layer, value embeddings included."""
    ids: Int[Tensor, "B 1 S 1"]
    """The tokens, shaped as keys of one head and one channel."""
    lengths: Int[Tensor, " B"]
    """Tokens each row holds."""

    @property
    def max_length(self) -> int:
        return self.ids.shape[2]

    def attend(
        self, layer: int, q: Heads, k: KVHeads, v: KVHeads, valid: Int[Tensor, " B"], window: int
    ) -> tuple[Heads, tuple[Tensor, Tensor]]:
        """What queries find when their own keys and values are there too; and the layer with these.

        Row b's queries continue it at `lengths[b]`; the first `valid[b]` of them are stored.
        """
        keys = append(self.keys[layer], k, self.lengths, valid)
        values = append(self.values[layer], v, self.lengths, valid)
        positions = self.lengths[:, None] + torch.arange(q.shape[1], device=q.device)
        return cached_attention(q, keys, values, positions, window=window), (keys, values)

    def advance(
        self,
        stored: list[tuple[Tensor, Tensor]],
        ids: Int[Tensor, "B T"],
        valid: Int[Tensor, " B"],
    ) -> "KVCache":
        """The cache after a step: new keys and values, the ids they are of, and lengths."""
        keys, values = zip(*stored, strict=True)
        held = append(self.ids, ids[:, :, None, None], self.lengths, valid)
        return KVCache(keys, values, held, self.lengths + valid)

    def newest_ids(self) -> Int[Tensor, " B"]:
        """The last token of every row; 0 in an empty one."""
        last = (self.lengths - 1).clamp(0, self.max_length - 1)
        ids = self.ids[:, 0, :, 0].gather(1, last[:, None])[:, 0]
        return torch.where(self.lengths > 0, ids, 0)


def make_cache(
    config: GPTConfig, rows: int, max_length: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """An empty cache. Memory: 2 x n_layer x rows x n_kv_head x max_length x head_dim x itemsize."""
    shape = (rows, config.n_kv_head, max_length, config.head_dim)
    layers = range(config.n_layer)
    return KVCache(
        keys=tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in layers),
        values=tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in layers),
        ids=torch.zeros(rows, 1, max_length, 1, dtype=torch.int64, device=device),
        lengths=torch.zeros(rows, dtype=torch.int64, device=device),
    )


def append(
    stored: Shaped[Tensor, "B K S C"],
    new: Shaped[Tensor, "B T K C"],
    starts: Int[Tensor, " B"],
    counts: Int[Tensor, " B"],
) -> Shaped[Tensor, "B K S C"]:
    """Write the first `counts` of T new entries into every row from its own `starts` on, in place.

    Nothing else changes, at the end of a full row either: where T entries would not fit, the slots
    that are written begin earlier and keep what they hold.
    """
    length, device = new.shape[1], stored.device
    rows = torch.arange(len(stored), device=device)[:, None]
    firsts = starts.clamp(max=stored.shape[2] - length)
    slots = firsts[:, None] + torch.arange(length, device=device)  # (B, T)
    source = slots - starts[:, None]  # which entry lands here
    fresh = new[rows, source.clamp(0, length - 1)].to(stored.dtype)
    write = ((source >= 0) & (source < counts[:, None]))[:, :, None, None]
    stored[rows, :, slots] = torch.where(write, fresh, stored[rows, :, slots])
    return stored


def read_rows(cache: KVCache, rows: slice, max_length: int) -> KVCache:
    """The first `max_length` positions of some rows as a cache of its own that shares memory."""
    return KVCache(
        keys=tuple(x[rows, :, :max_length] for x in cache.keys),
        values=tuple(x[rows, :, :max_length] for x in cache.values),
        ids=cache.ids[rows, :, :max_length],
        lengths=cache.lengths[rows],
    )


def write_rows(cache: KVCache, rows: slice, part: KVCache) -> KVCache:
    """Put what `read_rows` took out back in its place: only lengths ever left it."""
    cache.lengths[rows] = part.lengths
    return cache


def copy_row(cache: KVCache, source: int, target: int, length: int) -> KVCache:
    """Make row `target` hold the first `length` tokens of row `source`."""
    for x in (*cache.keys, *cache.values, cache.ids):
        x[target, :, :length] = x[source, :, :length]
    cache.lengths[target] = length
    return cache
