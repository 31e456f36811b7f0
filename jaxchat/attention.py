"""Causal attention with a sliding window: one function, several kernels.

A query sees itself and the `window` positions before it. All kernels compute the same thing:

- `reference`: the masked softmax as the textbook writes it, the oracle of the others;
- `blocked`: query blocks that slice only the keys they can see, so that work scales with the
  window; the fastest in plain XLA on a CPU (35 ms against 89 for the mask, T 512, window 128);
- `cudnn`: flash attention on NVIDIA GPUs, half precision only;
- `splash`: JAX's own flash attention for TPUs, which skips blocks that nobody sees. Elsewhere it is
  interpreted, for tests.

Grouped-query attention throughout: H query heads share K key/value heads. Scores and softmax are
float32 whatever the inputs are.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxchat import devices, sharding

Heads = Float[Array, "B T H C"]
KVHeads = Float[Array, "B T K C"]
Piece: TypeAlias = tuple[Float[Array, "B K _ C"], Float[Array, "B K _ C"], Bool[Array, "#B 1 T _"]]
"""Keys, values, and which of them each query sees."""

MIN_BLOCK = 128
"""Queries per block; longer sequences use larger blocks, at most `MAX_BLOCKS` of them."""

MAX_BLOCKS = 8

TPU_LANES = 128
"""A TPU's kernels want head widths and lengths in multiples of this."""

SPLASH_BLOCKS = (128, 256, 512)
"""Queries and keys at a time; larger ones would compute more of a window's corners."""

SPLASH_SIZES = (
    *("block_q", "block_kv", "block_kv_compute"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
)


def attention(
    q: Heads, k: KVHeads, v: KVHeads, *, window: int, implementation: str | None = None
) -> Heads:
    """Causal self-attention over whole sequences; `implementation=None` picks by device."""
    kernel = implementation or default_implementation(q.dtype, q.shape[1], q.shape[-1])
    if kernel == "cudnn":
        return _cudnn_attention(q, k, v, window=window)
    if kernel == "splash":
        return _splash_attention(q, k, v, window=window)
    if kernel == "blocked":
        return _blocked_attention(q, k, v, window=window)
    if kernel == "reference":
        return _reference_attention(q, k, v, window=window)
    raise ValueError(f"attention {kernel!r}: choose cudnn, splash, blocked or reference")


def default_implementation(dtype: DTypeLike, length: int, head_dim: int) -> str:
    """The device's flash attention where it can run, blocked XLA elsewhere.

    cuDNN: half precision and its head widths. Splash: whole blocks, and no call that the compiler
    would have to divide between devices.
    """
    if jax.default_backend() == "tpu":
        fits = head_dim % TPU_LANES == 0 and length % TPU_LANES == 0
        by_hand = jax.device_count() == 1 or sharding.left_to_the_compiler()
        return "splash" if fits and by_hand else "blocked"
    half = dtype in (jnp.bfloat16, jnp.float16)
    fits = head_dim % 8 == 0 and head_dim <= (256 if devices.since_hopper() else 128)
    runs = jax.default_backend() == "gpu" and devices.since_ampere()
    return "cudnn" if runs and half and fits else "blocked"


def cached_attention(
    q: Heads,
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    positions: Int[Array, "B T"],
    *,
    window: int,
) -> Heads:
    """Queries at their own absolute positions against a cache that already holds their keys."""
    slots = jnp.arange(keys.shape[2])
    behind = positions[:, None, :, None] - slots[None, None, None, :]  # (B, 1, T, S)
    return _attend(jnp.swapaxes(q, 1, 2), keys, values, (behind >= 0) & (behind <= window))


def _reference_attention(q: Heads, k: KVHeads, v: KVHeads, *, window: int) -> Heads:
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return cached_attention(
        q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), positions, window=window
    )


def _blocked_attention(q: Heads, k: KVHeads, v: KVHeads, *, window: int) -> Heads:
    length = q.shape[1]
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # (B, H, T, C)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = max(0, start - window)
        behind = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
        visible = (behind >= 0) & (behind <= window)
        seen = slice(first, stop)
        mask = visible[None, None]  # (1, 1, T, S)
        outputs.append(_attend(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], mask))
    return jnp.concatenate(outputs, axis=1)


def _cudnn_attention(q: Heads, k: KVHeads, v: KVHeads, *, window: int) -> Heads:
    """Asked for by name: with None, JAX picks XLA. A (w, 0) window covers w + 1 keys, as ours."""
    local = None if window >= q.shape[1] else (window, 0)
    kernel = partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=local,
        implementation="cudnn",
    )
    return _each_its_heads(kernel)(q, k, v)


def _splash_attention(q: Heads, k: KVHeads, v: KVHeads, *, window: int) -> Heads:
    """A (w, 0) window covers w + 1 keys here too; the scale is the caller's."""
    # loads Pallas, which nothing else needs
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, width = q.shape[1], q.shape[3]
    block = max(size for size in SPLASH_BLOCKS if length % size == 0)
    sizes: dict[str, Any] = dict.fromkeys(SPLASH_SIZES, block)
    seen = splash.LocalMask((length, length), (window, 0), 0)

    def kernel(q: Heads, k: KVHeads, v: KVHeads) -> Heads:
        one_row = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([seen] * q.shape[2]),
            block_sizes=splash.BlockSizes(**sizes),
            interpret=jax.default_backend() != "tpu",
        )
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * width**-0.5, k, v))
        out: Any = jax.vmap(one_row)(q, k, v)  # statistics too, where they are asked for
        return jnp.swapaxes(out, 1, 2)

    return _each_its_heads(kernel)(q, k, v)


def _each_its_heads(kernel: Callable[[Heads, KVHeads, KVHeads], Heads]) -> Callable[..., Heads]:
    """`kernel` on a mesh whose rows are cut by hand.

    The compiler cannot cut such a call along an axis of a mesh whose others are cut by hand.
    """
    if sharding.TENSOR not in sharding.left_to_the_compiler():
        return kernel
    heads = P(None, None, sharding.TENSOR)
    return jax.shard_map(
        kernel,
        in_specs=(heads,) * 3,
        out_specs=heads,
        axis_names={sharding.TENSOR},
        check_vma=False,
    )


def attend_pieces(q: Heads, pieces: Sequence[Piece]) -> Heads:
    """Softmax attention over keys that stand in several arrays, as if it were one."""
    return _attend_pieces(jnp.swapaxes(q, 1, 2), pieces)


def _attend(
    q: Float[Array, "B H T C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    visible: Bool[Array, "#B 1 T S"],
) -> Heads:
    """Softmax attention under a mask, heads leading; returns time before heads."""
    return _attend_pieces(q, [(k, v, visible)])


def _attend_pieces(q: Float[Array, "B H T C"], pieces: Sequence[Piece]) -> Heads:
    rows, heads, length, width = q.shape
    kv_heads = pieces[0][0].shape[1]
    group = heads // kv_heads
    # the queries of a group stand one after the other, as if each group were one longer head:
    # products with a single contracted axis are a quarter faster on a CPU (LOG.md)
    grouped = q.reshape(rows, kv_heads, group * length, width)
    scores = []
    for k, _, visible in pieces:
        products = jnp.einsum("bktc,bksc->bkts", grouped, k, preferred_element_type=jnp.float32)
        bias = jnp.tile(jnp.where(visible, 0.0, -jnp.inf), (1, 1, group, 1))  # (#B, 1, G*T, S)
        scores.append(products / math.sqrt(width) + bias)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    ends = list(itertools.accumulate(k.shape[2] for k, _, _ in pieces))
    shares = jnp.split(weights, ends[:-1], axis=-1)
    mixed = [
        jnp.einsum("bkts,bksc->bktc", share.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for share, (_, v, _) in zip(shares, pieces, strict=True)
    ]
    total = sum(mixed[1:], start=mixed[0]).astype(pieces[0][1].dtype)  # rounded once
    return jnp.swapaxes(total.reshape(rows, heads, length, width), 1, 2)
