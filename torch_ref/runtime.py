"""The machine as PyTorch sees it: which device, in which compute dtype.

The twin of `jaxchat/devices.py`; names and peak speeds are `jaxchat/runtime.py`'s.
"""

import os

import torch

from jaxchat import runtime
from jaxchat.backend import DeviceInfo

PLATFORMS = {"cuda": "gpu", "mps": "mps", "cpu": "cpu"}
"""What `DeviceInfo` calls torch's device types."""

MPS_SINCE = "2.14"
"""PyTorch before attended wrongly there, and said nothing: in half precision queries saw the future
(pytorch/pytorch#195910), and rows that decode together took the mask of the first (#184180)."""


def pick_device(number: int | None = None) -> torch.device:
    """CUDA, else MPS, else the CPU, unless `JAXCHAT_DEVICE` asks for one of them.

    `number` tells which of several; None is this process's own. ValueError where there is none.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    asked = os.environ.get("JAXCHAT_DEVICE") or next(name for name in there if there[name])
    if not there.get(asked, False):
        found = ", ".join(name for name in there if there[name])
        raise ValueError(f"JAXCHAT_DEVICE={asked!r} is not on this machine; it has {found}")
    count = torch.cuda.device_count() if asked == "cuda" else 1
    if number is not None and not 0 <= number < count:
        raise ValueError(f"there is no {asked} device {number}: {count} here, counted from 0")
    if asked == "mps" and torch.__version__ < MPS_SINCE:
        raise ValueError(
            f"PyTorch {torch.__version__} attends wrongly on a Mac's GPU: install "
            f"{MPS_SINCE} or later, or set JAXCHAT_DEVICE=cpu"
        )
    if asked != "cuda":
        return torch.device(asked)
    index = int(os.environ.get("LOCAL_RANK", "0")) if number is None else number
    if index >= count:
        raise ValueError(
            f"torchrun started more processes than there are GPUs: use --nproc-per-node {count}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def compute_dtype(device: torch.device, explicit: str | None = None) -> torch.dtype:
    """bfloat16 on CUDA from Ampere on, float16 on MPS, float32 elsewhere, unless asked for."""
    name = runtime.requested_dtype(explicit)
    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float16 if device.type == "mps" else torch.float32


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Where Muon iterates: bfloat16 only where it is fast; float16 would overflow."""
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if ampere else torch.float32


def describe(device: torch.device, world: int) -> DeviceInfo:
    """The `DeviceInfo` of `world` processes with one such device each."""
    peak = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = runtime.peak_flops(name)
    elif device.type == "mps":
        name = f"Apple GPU ({runtime.cpu_model()})"
    else:
        name = f"CPU process ({runtime.cpu_model()}, {os.cpu_count()} cores)"
    return DeviceInfo(
        platform=PLATFORMS[device.type],
        count=world,
        description=f"{world} x {name}",
        peak_flops=None if peak is None else peak * world,
    )
