"""The rows of a KV cache over the devices of a mesh: each generates for its own.

A model that decodes is small beside a device that trains it, so nothing is cut but the rows: the
i-th of n devices holds the i-th n-th of them and all of the weights, and the programs of
decoding.py run there as they would on one. Within a dispatch nobody waits for anybody; it ends when
the last device's does. What is about one row, such as reading a prompt, happens where that row is.
Devices along `tensor` repeat each other. Left out: how many rows there should be (the caller's).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from jaxchat import kv_cache
from jaxchat.kv_cache import KVCache
from jaxchat.sharding import DATA, FSDP, REPLICATED, ROWS

AXES = (DATA, FSDP)
"""The axes of the mesh over which rows are spread."""


def spread(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on every device: of what is called ROWS it sees and returns the device's own."""

    def run(*arrays: Any, **static: int) -> Any:
        return jax.shard_map(
            partial(function, **static),
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )(*arrays)

    return run


def reader(mesh: Mesh, read: Callable) -> Callable:
    """A chunk of a prompt, read by the device that has its row; the logits for all."""

    def run(params: Any, cache: KVCache, ids: Array, place: Any, *, bucket: int) -> Any:
        mine, row = _own(cache, place.row)
        result = partial(read, params, cache, ids, place._replace(row=row), bucket=bucket)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(result))
        window, logits = jax.lax.cond(mine, result, lambda: nothing)
        return window, jax.lax.psum(logits, AXES)

    return spread(mesh, run, (REPLICATED, ROWS, REPLICATED, REPLICATED), (ROWS, REPLICATED))


def writer(mesh: Mesh, write: Callable) -> Callable:
    """What reading has changed, into the row where it is."""

    def run(cache: KVCache, window: KVCache, place: Any, *, bucket: int) -> KVCache:
        mine, row = _own(cache, place.row)
        put = partial(write, window=window, place=place._replace(row=row), bucket=bucket)
        return jax.lax.cond(mine, put, lambda cache: cache, cache)

    return spread(mesh, run, (ROWS, ROWS, REPLICATED), ROWS)


def decoder(mesh: Mesh, decode: Callable) -> Callable:
    """A dispatch: what the rows gain, and what they sampled."""

    def run(params: Any, cache: KVCache, inputs: Any, *, bucket: int) -> Any:
        specs = jax.tree.map(lambda x: ROWS if jnp.ndim(x) else REPLICATED, inputs)
        specs = specs._replace(stops=REPLICATED)
        whole = spread(mesh, decode, (REPLICATED, ROWS, specs), (ROWS, ROWS))
        return whole(params, cache, inputs, bucket=bucket)

    return run


def keeper(mesh: Mesh, keep: Callable) -> Callable:
    """What the rows have gained, into the cache."""
    return spread(mesh, keep, (ROWS, ROWS), ROWS)


def copier(mesh: Mesh) -> Callable:
    """The first positions of a row into another, which may be on another device."""

    def run(cache: KVCache, source: Array, target: Array, *, bucket: int) -> KVCache:
        mine, row = _own(cache, source)
        found = kv_cache.read_row(cache, row, 0, bucket)
        found = jax.tree.map(lambda x: jnp.where(mine, x, jnp.zeros_like(x)), found)
        found = jax.lax.psum(found, AXES)
        mine, row = _own(cache, target)
        put = partial(kv_cache.write_row, row=row, start=0, part=found)
        return jax.lax.cond(mine, put, lambda cache: cache, cache)

    return spread(mesh, run, (ROWS, REPLICATED, REPLICATED), ROWS)


def _own(cache: KVCache, row: Int[Array, ""]) -> tuple[Bool[Array, ""], Int[Array, ""]]:
    """Whether this device has that row of all, and which of its own it is (none, if it has not)."""
    held = len(cache.lengths)
    local = row - jax.lax.axis_index(AXES) * held
    return (local >= 0) & (local < held), local
