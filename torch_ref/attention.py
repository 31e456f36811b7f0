"""Causal attention with a sliding window, on PyTorch's fused kernels.

A query sees itself and the `window` positions before it. `jaxchat/attention.py` picks among kernels
of its own; here `F.scaled_dot_product_attention` picks, and the one decision left is when to hand
it an explicit mask: only where a window really is shorter than the sequence, because a mask rules
out the flash kernels. Grouped-query attention repeats the key/value heads, which works everywhere.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor

Heads = Float[Tensor, "B T H C"]
KVHeads = Float[Tensor, "B T K C"]


def attention(q: Heads, k: KVHeads, v: KVHeads, *, window: int) -> Heads:
    """Causal self-attention over whole sequences."""
    length = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, C)
    if window >= length - 1:
        return _attend(q, k, v, None)
    positions = torch.arange(length, device=q.device)[None, None]
    return _attend(q, k, v, _visible(positions, length, window))


def cached_attention(
    q: Heads,
    keys: Float[Tensor, "B K S C"],
    values: Float[Tensor, "B K S C"],
    positions: Int[Tensor, "B T"],
    *,
    window: int,
) -> Heads:
    """Queries at their own absolute positions against a cache that already holds their keys."""
    visible = _visible(positions[:, None], keys.shape[2], window)  # (B, 1, T, S)
    return _attend(q.transpose(1, 2), keys, values, visible)


def _visible(positions: Int[Tensor, "B 1 T"], slots: int, window: int) -> Bool[Tensor, "B 1 T S"]:
    behind = positions[..., None] - torch.arange(slots, device=positions.device)
    return (behind >= 0) & (behind <= window)


def _attend(
    q: Float[Tensor, "B H T C"],
    k: Float[Tensor, "B K S C"],
    v: Float[Tensor, "B K S C"],
    visible: Bool[Tensor, "#B 1 T S"] | None,
) -> Heads:
    """Softmax attention, heads leading, causal without a mask; returns time before heads."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
    return mixed.transpose(1, 2)
