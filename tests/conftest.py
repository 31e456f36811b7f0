"""Strict numerics for every test: no silent promotion, shapes checked at run time."""

import os
import signal
import tempfile

# Eight devices on one machine, so that sharding is exercised everywhere, and a compiler that does
# not optimise: most of a test's time is compilation. Both are read when jax starts.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jaxtyping

TYPE_CHECKED = ["attention", "gpt", "kv_cache", "loss", "optim", "train_step", "decoding"]
TYPE_CHECKED_TORCH = ["loss", "optim", "train_step"]
"""Not its forward pass: without a jit every call is checked, which doubles the time of decoding.
test_torch_shapes.py checks that one in a process of its own."""
jaxtyping.install_import_hook(
    [f"jaxchat.{name}" for name in TYPE_CHECKED]
    + [f"torch_ref.{name}" for name in TYPE_CHECKED_TORCH],
    "beartype.beartype",
)

import jax  # noqa: E402 - after the flags above
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# how long an example takes says how busy the machine is
settings.register_profile("house", deadline=None)
settings.load_profile("house")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Tests compile the same small programs again and again."""
    compiled = tempfile.TemporaryDirectory(prefix="jaxchat-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(compiled.cleanup)
    jax.config.update("jax_compilation_cache_dir", compiled.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture
def interruptible():
    """SIGINT is heard by a test and what it starts, also where it is ignored: below nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    """An empty base directory of the test's own."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    return tmp_path
