"""Weights as a flat dict by dotted name, and back into a model.

`{"h.0.attn.c_q.weight": Array, ...}`: the names of `torch_ref` and of checkpoints. The model is
split once, outside jit; `bind` merges it inside, where it costs nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

Params = dict[str, jax.Array]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The structure of a model and its weights by name."""
    graphdef, state = nnx.split(model, nnx.Param)
    flat = nnx.to_flat_state(state)
    return graphdef, {".".join(map(str, path)): param.get_value() for path, param in flat}


def bind(graphdef: nnx.GraphDef, params: Mapping[str, jax.Array]) -> nnx.Module:
    """The model of `split` with these weights."""
    flat: dict[Any, nnx.Param] = {_path(name): nnx.Param(value) for name, value in params.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
