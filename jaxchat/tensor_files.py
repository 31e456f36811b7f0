"""Safetensors files to and from numpy, for Hugging Face folders.

The `safetensors` package reads the format; what it leaves to frameworks is here: folders cut into
several files, and bfloat16, which numpy does not have and float32 holds exactly.
"""

import json
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

NUMPY_DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
"""Of the kinds of numbers that weights come in; BF16 is the fourth."""


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One file that transformers reads (it asks for the format entry)."""
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    path.touch()  # as the umask says; the package's own files are for their owner alone
    mode = path.stat().st_mode
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(stat.S_IMODE(mode))


def read_safetensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a model folder in float32, from one file or from those of its index.

    FileNotFoundError when there are none, ValueError naming a file that is damaged.
    """
    index = directory / INDEX_FILE
    names = [WEIGHTS_FILE]
    if not (directory / WEIGHTS_FILE).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: {error!r}") from error
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        path = directory / Path(name).name  # an index names files of its own folder only
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {directory}")
        try:
            tensors |= {key: _as_float32(entry) for key, entry in _entries(path)}
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    return tensors


def _entries(path: Path) -> list[tuple[str, Mapping]]:
    return safetensors.deserialize(path.read_bytes())


def _as_float32(entry: Mapping) -> np.ndarray:
    if entry["dtype"] == "BF16":  # the upper half of a float32
        wide = np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(entry["shape"])
    numbers = np.frombuffer(entry["data"], NUMPY_DTYPES[entry["dtype"]])
    return numbers.astype(np.float32).reshape(entry["shape"])
