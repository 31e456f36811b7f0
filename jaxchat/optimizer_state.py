"""The optax state as a flat dict of numpy arrays, and back: the form in which it travels.

The names are those of `Backend.get_optimizer_state`, which torch_ref's optimizer has by nature. The
one idea: a name follows from where a leaf stands in the state, in the living tuples as in the
nested dicts that orbax reads without them. Stacks of matrices travel without the zero matrices
that fill them up to the device count.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxchat import distributed
from jaxchat.optim import matrices_by_shape


def flatten(state: Any, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a state over `params`, by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {_name(path): _whole(leaf) for path, leaf in leaves}
    counts = {shape: len(names) for shape, names in matrices_by_shape(params).items()}
    return {
        name: array[: counts[name.split(".")[-1]]] if name.startswith("muon.") else array
        for name, array in arrays.items()
    }


def shapes(state: Any, params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What `flatten` would give, without fetching it."""
    abstract = jax.tree.map(lambda x: np.broadcast_to(np.empty((), x.dtype), x.shape), state)
    return {name: array.shape for name, array in flatten(abstract, params).items()}


def fill(like: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """A state with the structure and placements of `like` and these arrays."""

    def leaf(path: tuple, old: jax.Array) -> jax.Array:
        array = np.asarray(arrays[_name(path)], old.dtype)
        if array.shape != old.shape:
            padding = [(0, old.shape[0] - len(array))] + [(0, 0)] * (array.ndim - 1)
            array = np.pad(array, padding)
        return distributed.put(array, old.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)


def read_numpy(directory: Path) -> Any:
    """What orbax wrote into `directory`, as nested dicts of numpy arrays on the host."""
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _stored(directory))
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(directory, restore_args=as_numpy)


def is_shaped_as(directory: Path, state: Any) -> bool:
    """Whether orbax wrote arrays of these shapes: another device count fills stacks up further."""
    wanted, found = (
        {_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (state, _stored(directory))
    )
    return wanted == found


def _stored(directory: Path) -> Any:
    """Orbax's description of every array in `directory`, as nested dicts."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no {directory.name} in {directory.parent}")
    with ocp.PyTreeCheckpointer() as reader:
        return reader.metadata(directory).item_metadata.tree


def _name(path: tuple) -> str:
    """`inner_states / wte / inner_state / mu / wte.weight` is `adam.mu.wte.weight`."""
    words = [str(getattr(key, "name", None) or getattr(key, "key", None)) for key in path]
    _, label, _, kind, *rest = words
    rule = "muon" if label == "matrices" else "adam"
    return ".".join([rule, kind, *(rest or [label])])


def _whole(leaf: Any) -> np.ndarray:
    """A leaf on the host, fetched from the other processes where they hold parts of it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
