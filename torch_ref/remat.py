"""Activations that are computed twice instead of kept, as in `jaxchat/remat.py`.

torch keeps all of a block's activations or only its input.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

REMAT = ("none", "block")
"""Those of `memory.REMAT` that there are here."""


def recomputed(block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`block(x, ...)`, which keeps for its gradient only what `remat` says (arXiv 1604.06174)."""
    return block if remat == "none" else partial(checkpoint, block, use_reentrant=False)
