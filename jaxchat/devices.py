"""The machine as JAX sees it: compute dtype, a description, memory, and compiling.

`torch_ref/runtime.py` is its twin.
"""

import os
from functools import cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxchat import runtime
from jaxchat.artifacts import base_dir
from jaxchat.backend import DeviceInfo

GPU_MEMORY_FRACTION = 0.92
"""What a process takes of a GPU's memory; the rest is for CUDA's own buffers."""

CPU_MEMORY_FRACTION = 0.25
"""What training may fill of a machine's memory, shared by its devices: others work there too."""

COMBINED_BYTES = 2**28
"""Collectives are combined up to this size, above the 113 MB of a layer's gradients at depth 24."""

Options: TypeAlias = dict[str, bool | str]
"""XLA's, by name."""

SEVERAL_GPUS: Options = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_reduce_combine_threshold_bytes": str(COMBINED_BYTES),
    "xla_gpu_all_gather_combine_threshold_bytes": str(COMBINED_BYTES),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(COMBINED_BYTES),
}
"""For the collectives of a training step."""

GRAPHS: Options = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    )
}
"""What XLA launches as CUDA graphs when it decodes: loops too."""


def check_platforms() -> None:
    """ValueError where JAX_PLATFORMS asks for what this machine has not."""
    try:
        jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter without a word, for cuda
        asked = os.environ.get("JAX_PLATFORMS")
        if not asked:
            raise
        raise ValueError(
            f"JAX_PLATFORMS={asked} is not on this machine, or JAX was installed without it: "
            f"unset it, or see README.md for GPUs and TPUs ({str(error) or 'no such device'})"
        ) from error


def compute_dtype(explicit: str | None = None) -> DTypeLike:
    """bfloat16 on TPU and on NVIDIA Ampere or later, float32 elsewhere, unless asked for."""
    name = runtime.requested_dtype(explicit)
    if name is None:
        name = "float32" if _is_cpu() or _before_ampere() else "bfloat16"
    return jnp.dtype(name)


def iteration_dtype() -> DTypeLike:
    """Precision of Muon's orthogonalisation: bfloat16 where that is fast, float32 elsewhere."""
    return jnp.float32 if _is_cpu() or _before_ampere() else jnp.bfloat16


def multiply_in(dtype: DTypeLike) -> None:
    """Let products of float32 be float32, where that is what a model computes in.

    JAX's default is TF32 on a GPU and rounds to bfloat16 on a TPU; PyTorch's is float32.
    """
    if dtype == jnp.float32 and not _is_cpu():
        jax.config.update("jax_default_matmul_precision", "highest")


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
        memory_bytes=_memory_bytes(),
    )


def on_host(values: Any, dtype: DTypeLike) -> Any:
    """A small argument of a jitted function, which travels with the call.

    An array of JAX's own is made and sent by itself: 25 of them cost 4 ms, as much as 4 decode
    steps of depth 24 (H200).
    """
    return np.asarray(values, dtype)


def claim_memory() -> None:
    """Let JAX take nearly all of a GPU's memory, not its usual three quarters.

    Before the first use of a device. XLA_CLIENT_MEM_FRACTION in the environment wins, and its older
    name does, beside which JAX refuses the new one.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))


def since_ampere() -> bool:
    """NVIDIA's A100, RTX 30, and what came after them."""
    return _compute_capability() >= 8.0


def since_hopper() -> bool:
    """H100, H200, and what came after them."""
    return _compute_capability() >= 9.0


def step_options(device_count: int) -> Options | None:
    """XLA's options for a training step on several GPUs: talk while computing, in few messages."""
    if device_count == 1 or jax.default_backend() != "gpu":
        return None
    return known(SEVERAL_GPUS)


def decode_options() -> Options | None:
    """XLA's options for decoding on a GPU: loops too belong into CUDA graphs.

    Outside of them a step would wait for its host at the loops of the sampler.
    """
    return known(GRAPHS) if jax.default_backend() == "gpu" else None


def known(options: Options) -> Options:
    """Those that this XLA takes: no version that has dropped one shall be unable to train."""
    return {name: value for name, value in options.items() if _is_known(name, value)}


@cache
def _is_known(name: str, value: bool | str) -> bool:
    try:
        jax.jit(lambda: jnp.zeros(())).lower().compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        runtime.print0(f"warning: this XLA does not take {name}={value}; it may be slower without")
        return False
    return True


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs: a warm start compiles in 0.5 s, not 7 (d4, CPU).

    They go below the base directory, unless JAX_COMPILATION_CACHE_DIR names another place. JAX
    finds a program again by the folder's path too, so that is the real one, however one gets there.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = (base_dir() / "compilation_cache").resolve()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _memory_bytes() -> int | None:
    if _is_cpu():
        return int(runtime.memory_bytes() * CPU_MEMORY_FRACTION) // jax.local_device_count()
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _is_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _before_ampere() -> bool:
    return 0 < _compute_capability() < 8.0


def _compute_capability() -> float:
    """NVIDIA's number for what a GPU can do; 0 for other devices (AMD's have a name instead)."""
    try:
        return float(getattr(jax.devices()[0], "compute_capability", 0))
    except ValueError:
        return 0.0
