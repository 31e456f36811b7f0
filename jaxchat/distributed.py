"""Several JAX processes as one run: meeting, agreeing, and what each of them holds.

Every process runs the same script and calls the same functions in the same order; the first one
writes what a run writes once (`runtime.is_first_process`). How they were started is read from the
environment (`runtime.launch`). Left out: restarting. A run that loses a process ends, and the same
command continues it from its last checkpoint, on as many processes as there are then.
"""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jaxtyping import Array

from jaxchat import runtime, sharding

MEETING_SECONDS = 1800
"""How long a process waits for the others at the start: a cluster may have to add their nodes."""

HEARTBEAT_SECONDS = 30
"""Silence after which a process counts as lost."""


def join() -> None:
    """Meet the other processes, where a launcher has started several; before anything else of jax.

    OSError when they do not come.
    """
    launch = runtime.launch()
    if launch is None or jax.distributed.is_initialized():
        return
    os.environ.update(grpc_proxy="")  # https_proxy counts otherwise, and knows no node
    print(
        f"process {launch.index} of {launch.count} ({launch.by}) meets the others at "
        f"{launch.coordinator or 'their coordinator'}, for {MEETING_SECONDS // 60} minutes at most",
        flush=True,
    )
    # ours: train_loop saves and stops at the same step everywhere
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=launch.coordinator,
            num_processes=launch.count,
            process_id=launch.index,
            local_device_ids=launch.devices,
            cluster_detection_method="deactivate" if launch.coordinator else None,
            initialization_timeout=MEETING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise OSError(
            f"process {launch.index} of {launch.count} ({launch.by}) did not meet the others at "
            f"{launch.coordinator or 'their coordinator'} within {MEETING_SECONDS} s: {error}"
        ) from error


def check_joined() -> None:
    """ValueError where JAX counts other processes than those that a launcher has told of.

    Each would take itself for the first: TPUs of Compute Engine know of each other by themselves.
    """
    alone = jax.process_count() > 1 and not jax.distributed.is_initialized()
    if alone or runtime.process_index() != jax.process_index():
        raise ValueError(
            f"this is process {jax.process_index()} of {jax.process_count()} to JAX, and process "
            f"{runtime.process_index()} to the environment: set JAXCHAT_COORDINATOR (host:port of "
            "the first), JAXCHAT_PROCESS_COUNT and JAXCHAT_PROCESS_INDEX, and no RANK"
        )


def put(x: np.ndarray, placement: Sharding) -> Array:
    """An array that every process holds whole, on the devices of all."""
    return jax.make_array_from_callback(x.shape, placement, lambda index: x[index])


def put_rows(x: np.ndarray, placement: NamedSharding) -> Array:
    """An array of which every process holds its own rows."""
    return jax.make_array_from_process_local_data(placement, x)


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, in order. A collective."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        json.loads(bytes(row[:length])) for row, length in zip(rows, lengths.ravel(), strict=True)
    ]


class Vote:
    """Whether any process asks for something, without waiting for each other.

    A call hands in a vote and returns the outcome of the one before, so that the answer is the
    same everywhere and the devices are never waited for. Every process must call equally often.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._placement = sharding.place(mesh, sharding.P(sharding.AXES))
        self._mine = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
        self._any = jax.jit(jnp.any, out_shardings=sharding.place(mesh, sharding.REPLICATED))
        self._pending: Array | None = None

    def __call__(self, asked: bool) -> bool:
        if jax.process_count() == 1:
            return asked
        before, votes = self._pending, np.full(self._mine, asked)
        self._pending = self._any(put_rows(votes, self._placement))
        return before is not None and bool(before)


def check_rows_are_local(mesh: Mesh) -> None:
    """ValueError when two processes would have to read the same rows."""
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if (processes != processes[..., :1]).any():
        raise ValueError(
            f"tensor={mesh.shape[sharding.TENSOR]} does not divide the {jax.local_device_count()} "
            "devices of one process: a row must stay within a process; use fsdp across hosts"
        )
