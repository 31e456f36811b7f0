"""What is computed twice instead of kept: what a block saves for its backward pass.

Activations, where that is asked for; and weights that are divided, which are gathered twice.
`torch_ref/remat.py` is its twin. XLA on a CPU finds that both computations are the same and merges
them again, so there it saves nothing (LOG.md).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxchat.params import Params, bind, split

Gather: TypeAlias = Callable[[Params], Params]
"""A block's weights from this device's shares of them, by their names within the block."""

BLOCK_INPUT = "block_input"

GATHERING = frozenset({"all_gather", "convert_element_type", "transpose"})
"""What a divided weight goes through before a product has it."""

_kept = jax.checkpoint_policies


def _all_but_gathered(operation: Any, *_: Any, **__: Any) -> bool:
    return operation.name not in GATHERING


POLICIES = {
    "none": _all_but_gathered,
    "products": _kept.dots_with_no_batch_dims_saveable,
    "block": _kept.nothing_saveable,
    "offload": _kept.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""By `memory.REMAT`. None keeps whole weights."""


def recomputed(block: nnx.Module, remat: str, gather: Gather | None = None) -> Callable[..., Any]:
    """`block(x, ...)`, which keeps for its gradient only what `remat` says (arXiv 1604.06174).

    With `gather` the block has shares of its weights, and makes them whole whenever it needs them.
    """
    if remat == "none" and gather is None:
        return block
    graphdef, params = split(block)

    def named(params: Params, x: jax.Array, *others: Any) -> Any:
        whole = bind(graphdef, params if gather is None else gather(params))
        return whole(checkpoint_name(x, BLOCK_INPUT), *others)

    return partial(jax.checkpoint(named, policy=POLICIES[remat]), params)
