"""The machine without a framework: peak speeds, names, asked-for precision, who may print.

What only a framework can tell is in devices.py and in torch_ref/runtime.py.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "TPU v6 lite": 918e12,
    "TPU v5": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v4": 275e12,
}
"""Dense bf16 FLOP/s by part of a device kind, from the vendors' data sheets; the longest counts.
JAX calls the v5p "TPU v5"."""

NAMED_DTYPES = ("float32", "bfloat16", "float16")


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one device; None where nobody states one (CPUs, unknown cards)."""
    names = [name for name in PEAK_FLOPS if re.search(rf"{name}(?!\w)", device_kind, re.IGNORECASE)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def requested_dtype(explicit: str | None) -> str | None:
    """The compute dtype asked for by argument or `JAXCHAT_DTYPE`, checked; None when neither."""
    name = explicit or os.environ.get("JAXCHAT_DTYPE") or None
    if name is not None and name not in NAMED_DTYPES:
        raise ValueError(f"compute dtype {name!r}: choose one of {', '.join(NAMED_DTYPES)}")
    return name


def memory_bytes() -> int:
    """Memory of this machine, or of the container that the process runs in."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return there
    return min(there, int(allowed)) if allowed.isdigit() else there


def cpu_model() -> str:
    """The processor's marketing name where the system tells it."""
    with suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            ask = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.check_output(ask, text=True, stderr=subprocess.DEVNULL).strip()
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


class Launch(NamedTuple):
    """One process of several, as its launcher describes it."""

    by: str
    """The launcher."""
    index: int
    count: int | None
    """None where only the framework can tell."""
    coordinator: str | None
    """host:port of the first process; None where only the framework can tell."""
    devices: list[int] | None = None
    """This process's share of its host's devices; None is all."""


COORDINATOR_PORT = 7733
"""Where the first process listens unless the environment says otherwise."""


def launch(env: Mapping[str, str] = os.environ) -> Launch | None:
    """Who started this process together with others; None when it is alone.

    In this order: JAXCHAT_COORDINATOR (host:port) with JAXCHAT_PROCESS_COUNT and
    JAXCHAT_PROCESS_INDEX, or with the JOB_COMPLETION_INDEX that Kubernetes gives; SkyPilot; Slurm
    (srun); Open MPI; Cloud TPU. ValueError when the first is incomplete.
    """
    if address := env.get("JAXCHAT_COORDINATOR"):
        index = env.get("JAXCHAT_PROCESS_INDEX") or env.get("JOB_COMPLETION_INDEX")
        count = env.get("JAXCHAT_PROCESS_COUNT")
        if not index or not count:
            raise ValueError(
                f"JAXCHAT_COORDINATOR={address} wants JAXCHAT_PROCESS_COUNT and "
                "JAXCHAT_PROCESS_INDEX (or Kubernetes' JOB_COMPLETION_INDEX) beside it"
            )
        if ":" not in address:
            address = f"{address}:{COORDINATOR_PORT}"
        return Launch("JAXCHAT_COORDINATOR", int(index), int(count), address)
    if int(env.get("SKYPILOT_NUM_NODES", "1")) > 1:
        first = env["SKYPILOT_NODE_IPS"].split()[0]
        count, index = int(env["SKYPILOT_NUM_NODES"]), int(env["SKYPILOT_NODE_RANK"])
        return Launch("SkyPilot", index, count, f"{first}:{COORDINATOR_PORT}")
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in env:
        # the job's number, so that two jobs on one node do not meet
        port = COORDINATOR_PORT + int(env["SLURM_JOB_ID"]) % 4096
        address = f"{_first_host(env['SLURM_STEP_NODELIST'])}:{port}"
        shared = not env.get("SLURM_STEP_TASKS_PER_NODE", "1").startswith("1(") and int(
            env["SLURM_NTASKS"]
        ) > int(env.get("SLURM_STEP_NUM_NODES", "1"))
        mine = [int(env["SLURM_LOCALID"])] if shared else None
        return Launch("Slurm", int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), address, mine)
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return Launch("Open MPI", int(env["OMPI_COMM_WORLD_RANK"]), None, None)
    if "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return Launch("Cloud TPU", int(env["TPU_WORKER_ID"]), None, None)
    return None


def _first_host(nodes: str) -> str:
    """node07 of `node[07-09,12],other`."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    assert match, f"no host in the node list {nodes!r}"
    return match[1] + (match[2] or "")


def process_index() -> int:
    """This process among those of the run, from the launcher's environment (0 when alone).

    torchrun says it in RANK, also below srun.
    """
    started = None if "TORCHELASTIC_RUN_ID" in os.environ else launch()
    return int(os.environ.get("RANK", "0")) if started is None else started.index


def is_first_process() -> bool:
    """Whether this process writes what a run writes once: checkpoints, metrics, report, prints."""
    return process_index() == 0


def print0(*words: object) -> None:
    """Print on the first process only, at once."""
    if is_first_process():
        print(*words, flush=True)
