"""Checkpoints of this backend on disk: `params.pt` and `optimizer.pt`, flat dicts of tensors.

Files are read with `weights_only`, which unpickles tensors and nothing that executes. A folder
appears under its name when all its files are whole. Left out: names and steps of checkpoints
(`jaxchat/checkpoint.py`) and other formats (`jaxchat/convert.py`).
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jaxchat.convert import check_params
from torch_ref.gpt import GPT

PARAMS, OPTIMIZER = "params.pt", "optimizer.pt"


def get_params(model: GPT) -> dict[str, np.ndarray]:
    """Every weight by dotted name, copied to numpy."""
    return {name: x.detach().cpu().numpy().copy() for name, x in model.named_parameters()}


@torch.no_grad()
def set_params(model: GPT, params: Mapping[str, np.ndarray]) -> None:
    """Replace every weight; ValueError lists missing, extra and misshapen names."""
    own = dict(model.named_parameters())
    check_params(params, {name: tuple(x.shape) for name, x in own.items()})
    for name, param in own.items():
        param.copy_(torch.tensor(params[name]))


def save_folder(directory: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write dicts of tensors as files of `directory`; a new folder appears complete or not at all.

    Into a folder that exists already, each file arrives whole; what a killed save leaves is in it.
    """
    place = directory if directory.exists() else directory.parent
    place.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=place))
    try:
        for name, tensors in files.items():
            with (staging / name).open("wb") as file:
                torch.save({key: x.detach().cpu() for key, x in tensors.items()}, file)
                file.flush()
                os.fsync(file.fileno())
        if directory.exists():
            for name in files:
                (staging / name).replace(directory / name)
        else:
            staging.chmod(0o755)  # mkdtemp's folders are private
            staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_file(path: Path) -> dict[str, np.ndarray]:
    """A file that holds a dict of tensors; half-precision ones arrive as float32.

    FileNotFoundError when there is none, ValueError when it holds anything else or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler answers damage with whatever it trips over
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(f"{path} holds something else than a dict of tensors")
    halves = (torch.bfloat16, torch.float16)
    return {n: (x.float() if x.dtype in halves else x).numpy() for n, x in tensors.items()}
