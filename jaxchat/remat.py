"""Activations that are computed twice instead of kept: what a block saves for its backward pass.

`torch_ref/remat.py` is its twin. XLA on a CPU finds that both computations are the same and merges
them again, so there it saves nothing (LOG.md).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

BLOCK_INPUT = "block_input"

_kept = jax.checkpoint_policies

POLICIES = {
    "products": _kept.dots_with_no_batch_dims_saveable,
    "block": _kept.nothing_saveable,
    "offload": _kept.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""By `memory.REMAT`, but for `none`."""


def recomputed(block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`block(x, ...)`, which keeps for its gradient only what `remat` says (arXiv 1604.06174)."""
    if remat == "none":
        return block

    def named(x: jax.Array, *others: Any) -> Any:
        return block(checkpoint_name(x, BLOCK_INPUT), *others)

    return jax.checkpoint(named, policy=POLICIES[remat])
