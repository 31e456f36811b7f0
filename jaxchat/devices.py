"""The machine as JAX sees it: compute dtype, a description, and the compilation cache.

`torch_ref/runtime.py` is its twin.
"""

import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxchat import runtime
from jaxchat.artifacts import base_dir
from jaxchat.backend import DeviceInfo


def compute_dtype(explicit: str | None = None) -> DTypeLike:
    """bfloat16 on TPU and on NVIDIA Ampere or later, float32 elsewhere, unless asked for."""
    name = runtime.requested_dtype(explicit)
    if name is None:
        name = "float32" if _is_cpu() or _before_ampere() else "bfloat16"
    return jnp.dtype(name)


def iteration_dtype() -> DTypeLike:
    """Precision of Muon's orthogonalisation: bfloat16 where that is fast, float32 on CPU."""
    return jnp.float32 if _is_cpu() else jnp.bfloat16


def pick(number: int | None) -> list[jax.Device]:
    """Every device of the run, or the local one of that number alone."""
    if number is None:
        return jax.devices()
    local = jax.local_devices()
    if not 0 <= number < len(local):
        raise ValueError(
            f"there is no device {number}: this process has {len(local)}, counted from 0"
        )
    return [local[number]]


def describe(count: int, row_shares: int | None = None) -> DeviceInfo:
    """What `count` devices are, of which `row_shares` (all, when None) have rows of their own."""
    kind = jax.devices()[0].device_kind
    on_cpu = f"CPU device ({runtime.cpu_model()}, {os.cpu_count()} cores)"
    name = on_cpu if _is_cpu() else kind
    peak = runtime.peak_flops(kind)
    return DeviceInfo(
        platform=jax.default_backend(),
        count=row_shares or count,
        description=f"{count} x {name}",
        peak_flops=None if peak is None else peak * count,
        processes=jax.process_count(),
        process=jax.process_index(),
    )


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs: a warm start compiles in 0.5 s, not 7 (d4, CPU).

    They go below the base directory, unless JAX_COMPILATION_CACHE_DIR names another place.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compilation_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _is_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _before_ampere() -> bool:
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return capability is not None and float(capability) < 8.0
