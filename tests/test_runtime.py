"""The machine without a framework."""

import platform
import sys

import pytest

from jaxchat import runtime


def test_the_longest_name_of_a_card_decides_its_peak():
    assert runtime.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert runtime.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert runtime.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert runtime.peak_flops("NVIDIA A10") == 125e12
    assert runtime.peak_flops("NVIDIA RTX A1000 Laptop GPU") is None  # no A100
    assert runtime.peak_flops("NVIDIA H100 NVL") == 835e12
    assert runtime.peak_flops("NVIDIA GB200") == 2500e12
    assert runtime.peak_flops("NVIDIA L40") == 181e12
    assert runtime.peak_flops("TPU v5") == 459e12  # v5p
    assert runtime.peak_flops("TPU v5 lite") == 197e12
    assert runtime.peak_flops("cpu") is None


def test_a_mac_tells_the_name_of_its_chip(tmp_path, monkeypatch):
    """It has no /proc; where nothing tells it, the architecture has to do."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.cpu_model() in (platform.processor(), platform.machine())
    sysctl = tmp_path / "sysctl"
    sysctl.write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo "Apple M4"\n')
    sysctl.chmod(0o755)
    assert runtime.cpu_model() == "Apple M4"


def test_an_explicit_dtype_wins_over_the_environment(monkeypatch):
    monkeypatch.delenv("JAXCHAT_DTYPE", raising=False)
    assert runtime.requested_dtype(None) is None
    monkeypatch.setenv("JAXCHAT_DTYPE", "bfloat16")
    assert runtime.requested_dtype(None) == "bfloat16"
    assert runtime.requested_dtype("float32") == "float32"
    monkeypatch.setenv("JAXCHAT_DTYPE", "bf16")
    with pytest.raises(ValueError, match=r"'bf16'.*choose one of float32, bfloat16, float16"):
        runtime.requested_dtype(None)


def test_torchrun_counts_where_srun_has_started_it(monkeypatch):
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_JOB_ID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "node[1-2]",
    }
    for name, value in (slurm | {"RANK": "3"}).items():
        monkeypatch.setenv(name, value)
    assert runtime.process_index() == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert runtime.process_index() == 3


@pytest.mark.parametrize(("rank", "prints"), [(None, True), ("0", True), ("3", False)])
def test_only_the_first_process_prints(rank, prints, monkeypatch, capsys):
    monkeypatch.delenv("JAXCHAT_PROCESS_INDEX", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    runtime.print0("step", 1)
    assert capsys.readouterr().out == ("step 1\n" if prints else "")
