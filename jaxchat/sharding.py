"""Where every array lives: the one table of placements.

The mesh has three axes. `data`: devices with other rows and the same weights. `fsdp`: other rows
too, and each holds a share of every weight, gathered when a step needs it (ZeRO-3, arXiv
1910.02054). `tensor`: the same rows, and each computes a share of the heads, hidden units and
vocabulary (Megatron, arXiv 1909.08053). Optimizer state is cut over all of them: AdamW's tables by
rows, and Muon's matrices stack by shape and the stack is divided, so that an orthogonalisation
stays on one device. `MeshLayout` says how gradients get there and updates back: axis by axis, which
XLA turns into all-to-alls and slices; asked for in one go, it gathers everything first.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

AXES = (DATA, FSDP, TENSOR)

REPLICATED = P()
"""Scalars of any kind."""

MICRO_BATCHES = P(None, (DATA, FSDP))
"""(A, B, T) token ids: rows over the devices that do not share them."""

ROWS = P((DATA, FSDP))
"""(B, ...) evaluation batches."""

STACK = P((FSDP, TENSOR, DATA))
"""(N, out, in) matrix stacks and their moments: whole matrices, over all devices."""

TENSOR_DIM = {
    "c_q": 0,
    "c_k": 0,
    "c_v": 0,
    "c_fc": 0,
    "c_proj": 1,
    "wte": 0,
    "lm_head": 0,
    "value_embeds": 1,
}
"""The dimension of a weight that `tensor` cuts: heads and hidden units, or the vocabulary."""


def parse_mesh(text: str, device_count: int) -> dict[str, int]:
    """Axis sizes from `data=2,fsdp=4`; one axis may be left out of the product and is filled in.

    ValueError when a name is unknown or the product is not the device count.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if not match or match[1] not in AXES or match[1] in sizes:
            raise ValueError(
                f"--mesh {text}: give auto, or sizes of {', '.join(AXES)} as in data=2,fsdp=4"
            )
        sizes[match[1]] = int(match[2])
    if DATA not in sizes:
        sizes[DATA] = max(1, device_count // math.prod(sizes.values()))
    if math.prod(sizes.values()) != device_count:
        raise ValueError(
            f"--mesh {text} is {math.prod(sizes.values())} device(s) and there are {device_count}: "
            "the sizes must multiply to that"
        )
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(
    devices: Sequence[jax.Device] | None = None, sizes: Mapping[str, int] | None = None
) -> Mesh:
    """A mesh of these devices; all of them on the data axis unless `sizes` says otherwise.

    In their own order, process after process: `jax.make_mesh` takes every host with GPUs for a
    slice of its own and refuses several, and may put one row of a batch on two hosts with TPUs.
    """
    devices = jax.devices() if devices is None else devices
    sizes = sizes or {DATA: len(devices)}
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return Mesh(np.reshape(devices, shape), AXES, axis_types=(AxisType.Auto,) * 3)


def row_shares(mesh: Mesh) -> int:
    """Into how many shares the rows of a batch are cut."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def place(mesh: Mesh, spec: P) -> NamedSharding:
    return NamedSharding(mesh, spec)


def rows(mesh: Mesh, x: Any) -> NamedSharding:
    """Divide the rows where they divide evenly; replicate otherwise."""
    return place(mesh, ROWS if x.shape[0] % row_shares(mesh) == 0 else REPLICATED)


def weight(mesh: Mesh, name: str, shape: Sequence[int]) -> P:
    """The placement of a weight, and of its gradient: replicated over `data`."""
    dims: list[Any] = [None] * len(shape)
    if len(shape) != 2 or "gate" in name:
        return REPLICATED
    tensor_dim = next(d for word, d in TENSOR_DIM.items() if word in name.split("."))
    if mesh.shape[TENSOR] > 1 and shape[tensor_dim] % mesh.shape[TENSOR] == 0:
        dims[tensor_dim] = TENSOR
    fsdp_dim = dims.index(None)  # the rows, whose shares are contiguous, unless they are taken
    if mesh.shape[FSDP] > 1 and shape[fsdp_dim] % mesh.shape[FSDP] == 0:
        dims[fsdp_dim] = FSDP
    return P(*dims)


def moment(mesh: Mesh, name: str, shape: Sequence[int]) -> P:
    """The placement of AdamW's moments: the weight's own, cut once more over `data` by rows."""
    spec = weight(mesh, name, shape)
    if len(shape) != 2:
        return spec
    dims = [*spec, None, None][:2]
    axes = tuple(a for a in (dims[0], DATA) if a is not None)
    even = shape[0] % math.prod(mesh.shape[a] for a in axes) == 0
    return P(axes, dims[1]) if even and mesh.shape[DATA] > 1 else spec


def weights(mesh: Mesh, like: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """The placement of every weight."""
    return {name: place(mesh, weight(mesh, name, x.shape)) for name, x in like.items()}


def optimizer_state(mesh: Mesh, like: Any) -> Any:
    """The placement of every array of an optimizer state."""

    def leaf(path: tuple, x: Any) -> NamedSharding:
        if x.ndim == 3:
            return place(mesh, STACK)
        name = getattr(path[-1], "key", "") if path else ""
        return place(mesh, moment(mesh, name, x.shape) if x.ndim == 2 else REPLICATED)

    return jax.tree_util.tree_map_with_path(leaf, like)


def in_memory(kind: str, placements: Any) -> Any:
    """The same placements in memory of a kind: `device`, or its host's, `pinned_host`."""
    return jax.tree.map(lambda place: place.with_memory_kind(kind), placements)


def without(axis: str, spec: P) -> P:
    """The placement with `axis` gathered."""
    return P(*(None if entry == axis else entry for entry in spec))


def left_to_the_compiler() -> set[str]:
    """Inside a `shard_map` the axes of the mesh that are not cut by hand; none outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return set(mesh.auto_axes) if mesh.manual_axes else set()


def gathered(mesh: Mesh, params: Mapping[str, Array]) -> dict[str, Array]:
    """Weights for a jitted forward: no longer cut over `fsdp`."""
    return {
        name: jax.lax.with_sharding_constraint(
            x, place(mesh, without(FSDP, weight(mesh, name, x.shape)))
        )
        for name, x in params.items()
    }


class Layout:
    """How an optimizer's arrays lie on one device: everything stays where it is."""

    def __init__(self, multiple: int = 1) -> None:
        self.multiple = multiple
        """Stacks of matrices are filled up to a multiple of this."""

    def share(self, name: str, x: Array) -> Array:
        """A gradient or an update of AdamW, as its moments lie."""
        del name
        return x

    def divide(self, names: Sequence[str], stack: Array) -> Array:
        """A stack of matrices, each as its weight lies, to whole matrices on their devices."""
        del names
        return stack

    def restore(self, names: Sequence[str], stack: Array) -> Array:
        """The way back."""
        del names
        return stack


class MeshLayout(Layout):
    """The same on a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh.size)
        self._mesh = mesh

    def share(self, name: str, x: Array) -> Array:
        return self._pin(x, moment(self._mesh, name, x.shape))

    def divide(self, names: Sequence[str], stack: Array) -> Array:
        for spec in self._way(names, stack):
            stack = self._pin(stack, spec)
        return stack

    def restore(self, names: Sequence[str], stack: Array) -> Array:
        for spec in reversed(self._way(names, stack)):
            stack = self._pin(stack, spec)
        return stack

    def _way(self, names: Sequence[str], stack: Array) -> list[P]:
        """One axis at a time moves from inside the matrices to the stack."""
        inside = list(weight(self._mesh, names[0], stack.shape[1:]))
        inside += [None] * (2 - len(inside))
        way, leading = [P(None, *inside)], []
        for axis in (FSDP, TENSOR):
            if axis in inside:
                inside[inside.index(axis)] = None
                leading.append(axis)
                way.append(P(tuple(leading), *inside))
        return [*way, STACK]

    def _pin(self, x: Array, spec: P) -> Array:
        return jax.lax.with_sharding_constraint(x, place(self._mesh, spec))
