"""The machine without a framework."""

import pytest

from jaxchat import runtime


def test_the_longest_name_of_a_card_decides_its_peak():
    assert runtime.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert runtime.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert runtime.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert runtime.peak_flops("NVIDIA A10") == 125e12
    assert runtime.peak_flops("cpu") is None


def test_an_explicit_dtype_wins_over_the_environment(monkeypatch):
    monkeypatch.delenv("JAXCHAT_DTYPE", raising=False)
    assert runtime.requested_dtype(None) is None
    monkeypatch.setenv("JAXCHAT_DTYPE", "bfloat16")
    assert runtime.requested_dtype(None) == "bfloat16"
    assert runtime.requested_dtype("float32") == "float32"
    monkeypatch.setenv("JAXCHAT_DTYPE", "bf16")
    with pytest.raises(ValueError, match=r"'bf16'.*choose one of float32, bfloat16, float16"):
        runtime.requested_dtype(None)


@pytest.mark.parametrize(("rank", "prints"), [(None, True), ("0", True), ("3", False)])
def test_only_the_first_process_prints(rank, prints, monkeypatch, capsys):
    monkeypatch.delenv("JAXCHAT_PROCESS_INDEX", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    runtime.print0("step", 1)
    assert capsys.readouterr().out == ("step 1\n" if prints else "")
