"""The machine: devices, processes, compute dtype, peak speed, and who may print.

Environment variables that choose hardware behaviour are read here and nowhere else. Importing this
module does not import jax; functions that ask the devices do.
"""

import os
import platform
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax.numpy as jnp

PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "TPU v6 lite": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v4": 275e12,
}
"""Dense bf16 FLOP/s by device-kind substring, from the vendors' data sheets; first match wins."""

NAMED_DTYPES = ("float32", "bfloat16", "float16")


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one device; None where nobody states one (CPUs, unknown cards)."""
    for name, peak in PEAK_FLOPS.items():
        if name.lower() in device_kind.lower():
            return peak
    return None


def requested_dtype(explicit: str | None) -> str | None:
    """The compute dtype asked for by argument or `JAXCHAT_DTYPE`, checked; None when neither."""
    name = explicit or os.environ.get("JAXCHAT_DTYPE") or None
    if name is not None and name not in NAMED_DTYPES:
        raise ValueError(f"compute dtype {name!r}: choose one of {', '.join(NAMED_DTYPES)}")
    return name


def compute_dtype(explicit: str | None = None) -> "jnp.dtype":
    """bfloat16 on TPU and on NVIDIA Ampere or later, float32 on CPU, unless asked otherwise."""
    import jax
    import jax.numpy as jnp

    name = requested_dtype(explicit)
    if name is None:
        name = "float32" if jax.default_backend() == "cpu" or _before_ampere() else "bfloat16"
    return jnp.dtype(name)


def _before_ampere() -> bool:
    import jax

    capability = getattr(jax.devices()[0], "compute_capability", None)
    return capability is not None and float(capability) < 8.0


def device_summary() -> str:
    """`2 x NVIDIA H100 80GB HBM3`, or the CPU's model and its cores."""
    import jax

    devices = jax.devices()
    if jax.default_backend() == "cpu":
        return f"{len(devices)} x CPU device ({cpu_model()}, {os.cpu_count()} cores)"
    return f"{len(devices)} x {devices[0].device_kind}"


def cpu_model() -> str:
    """The processor's marketing name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as info:
            match = re.search(r"model name\s*:\s*(.+)", info.read())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def process_index() -> int:
    """This process among those of the run, from the launcher's environment (0 when alone)."""
    return int(os.environ.get("JAXCHAT_PROCESS_INDEX", os.environ.get("RANK", "0")))


def print0(*words: object) -> None:
    """Print on the first process only, at once."""
    if process_index() == 0:
        print(*words, flush=True)


def enable_compilation_cache(directory: str) -> None:
    """Keep compiled programs between runs: a warm start compiles in 0.5 s, not 7 (d4, CPU)."""
    import jax

    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
