"""What JAX and XLA are asked for on the machine at hand."""

import os
import subprocess
import sys

import jax
import pytest
from jaxlib import xla_client

from jaxchat import devices


@pytest.mark.parametrize("given", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_share_of_memory_by_either_name_is_what_jax_takes(given, monkeypatch):
    """Of both names at once it makes an error, and no GPU."""
    for environment, share in (({}, 0.92), ({given: "0.5"}, 0.5)):
        monkeypatch.setattr(os, "environ", environment)
        devices.claim_memory()
        assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == share


def test_an_option_that_this_xla_lacks_is_left_out_and_told_once(capsys):
    """Each version drops some; to compile with one of them is an error."""
    asked = {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_of_yesterday": "3"}
    for _ in range(2):
        assert devices.known(asked) == {"xla_gpu_enable_latency_hiding_scheduler": True}
    told = "warning: this XLA does not take xla_of_yesterday=3; it may be slower without\n"
    assert capsys.readouterr().out == told


def test_this_xla_takes_all_that_gpus_are_given():
    assert devices.known(devices.SEVERAL_GPUS) == devices.SEVERAL_GPUS
    assert devices.known(devices.GRAPHS) == devices.GRAPHS


def test_a_local_device_has_a_number_from_0():
    assert devices.pick(0) == jax.local_devices()[:1]
    assert devices.pick(7) == jax.local_devices()[7:]
    for number in (-1, 8):
        with pytest.raises(ValueError, match=f"no device {number}: this process has 8, counted"):
            devices.pick(number)


@pytest.mark.parametrize("platform", ["cuda", "gpu", "cpuu"])
def test_a_platform_that_is_not_there_is_named(platform):
    """It was a traceback, that for cuda without a word."""
    asks = "from jaxchat import devices; devices.check_platforms()"
    done = subprocess.run(
        [sys.executable, "-c", asks],
        env={**os.environ, "JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: JAX_PLATFORMS={platform} is not on this machine")
