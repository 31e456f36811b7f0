"""On which device, in which dtype and in how many processes PyTorch runs here."""

import pytest
import torch

from tests.test_torch_backend import MODERN
from torch_ref import runtime
from torch_ref.torch_backend import TorchBackend


def test_device_and_dtype_follow_the_environment(monkeypatch):
    monkeypatch.setenv("JAXCHAT_DEVICE", "cpu")
    monkeypatch.setenv("JAXCHAT_DTYPE", "bfloat16")
    assert TorchBackend(MODERN).dtype == torch.bfloat16
    assert TorchBackend(MODERN, dtype="float32").dtype == torch.float32
    monkeypatch.setenv("JAXCHAT_DTYPE", "int8")
    with pytest.raises(ValueError, match="'int8': choose one of float32"):
        TorchBackend(MODERN)
    monkeypatch.setenv("JAXCHAT_DEVICE", "toaster")
    with pytest.raises(ValueError, match="JAXCHAT_DEVICE='toaster' is not on this machine"):
        runtime.pick_device()


def test_the_default_dtype_is_the_devices(monkeypatch):
    monkeypatch.delenv("JAXCHAT_DTYPE", raising=False)
    assert runtime.compute_dtype(torch.device("cpu")) == torch.float32
    assert runtime.compute_dtype(torch.device("mps")) == torch.float16
    for capability, dtype in {(7, 5): torch.float32, (8, 0): torch.bfloat16}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert runtime.compute_dtype(torch.device("cuda")) == dtype


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("JAXCHAT_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runtime.pick_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="use --nproc-per-node 2"):
        runtime.pick_device()


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch):
    """Each would train all of it, and write to the same folder."""
    for name, value in {
        "COORDINATOR": "host:1",
        "PROCESS_COUNT": "2",
        "PROCESS_INDEX": "1",
    }.items():
        monkeypatch.setenv(f"JAXCHAT_{name}", value)
    with pytest.raises(ValueError, match="start it with torchrun, or use --backend jax"):
        TorchBackend(MODERN)
    monkeypatch.setenv("JAXCHAT_PROCESS_COUNT", "1")
    assert TorchBackend(MODERN).ranks.world == 1
