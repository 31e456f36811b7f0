"""Where a process runs: versions, hardware, and the commit of the source, for the record."""

import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path

from jaxchat import runtime

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "torch",
    "numpy",
    "tiktoken",
    "rustbpe",
)
"""Whose versions are stated (read from their metadata, nothing is imported)."""


def describe() -> dict[str, str]:
    """Names and what this process has of them; takes no framework."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"cpu": _cpu(), "memory": _memory(), "gpu": _gpus(), "commit": _commit()}


def _cpu() -> str:
    on_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count()
    return f"{runtime.cpu_model()}, {cores} cores"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        return "unknown"


def _gpus() -> str:
    query = "--query-gpu=name,memory.total"
    names = _output("nvidia-smi", query, "--format=csv,noheader").splitlines()
    return "; ".join(f"{n} x {name}" for name, n in Counter(names).items()) or "none"


def _commit() -> str:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # an installed wheel
        return "unknown"
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    dirty = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit or 'unknown'}{' (dirty)' if dirty else ''}"


def _output(*command: str) -> str:
    """What `command` prints, or "" when it is missing, fails or takes over 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
