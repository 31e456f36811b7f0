"""Where every array lives: the one table of placements.

The mesh has one axis, `data`: each device holds all weights and its own rows of a batch, while the
optimizer state is cut over the devices (ZeRO, arXiv 1910.02054): Muon's matrices stack by shape and
the stack is divided, so that an orthogonalisation stays on one device; AdamW's tables are divided
by rows.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"

REPLICATED = P()
"""Weights, and scalars of any kind."""

MICRO_BATCHES = P(None, DATA)
"""(A, B, T) token ids: rows over the devices."""

ROWS = P(DATA)
"""(B, ...) evaluation batches, (N, out, in) matrix stacks, (V, D) moments: the leading axis."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices on the data axis."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def place(mesh: Mesh, spec: P) -> NamedSharding:
    return NamedSharding(mesh, spec)


def leading_axis(mesh: Mesh, x: jax.Array | jax.ShapeDtypeStruct | np.ndarray) -> NamedSharding:
    """Divide the leading axis over the devices where it divides evenly; replicate otherwise."""
    even = x.ndim > 0 and x.shape[0] % mesh.size == 0
    return place(mesh, ROWS if even else REPLICATED)
