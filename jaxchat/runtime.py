"""The machine without a framework: peak speeds, names, asked-for precision, who may print.

What only a framework can tell is in devices.py and in torch_ref/runtime.py.
"""

import os
import platform
import re

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


def is_first_process() -> bool:
    """Whether this process writes what a run writes once: checkpoints, metrics, report, prints."""
    return process_index() == 0


def print0(*words: object) -> None:
    """Print on the first process only, at once."""
    if is_first_process():
        print(*words, flush=True)
