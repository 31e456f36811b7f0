"""Flash attention of GPUs and TPUs as a training step calls it, on meshes of CPU devices.

cuDNN's kernels are stood in for by XLA's; everything around them is real: the checks, the call that
JAX cuts along a mesh by rules of its own, and its gradient. Those once refused every mesh of more
than one device. The kernels for TPUs are themselves run, by Pallas' interpreter.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import mlir

from jaxchat import attention, devices, sharding
from jaxchat.gpt import GPT
from jaxchat.params import split
from jaxchat.train_step import loss_and_grads
from tests.models import MODERN, make_perturbed
from tests.test_sharding import SIZES, mesh_of

CONFIG = replace(MODERN, n_layer=2, window_pattern="SL")
WIDE = replace(CONFIG, n_layer=3, n_head=2, n_embd=256)
"""Heads as wide as a TPU wants them, and a layer after the one that backout takes away: of two, the
last would be taken from itself, and backout's gradient be nothing but rounding."""


def forward(q, k, v, *_, sliding_window_length, is_training, **_others):
    # JAX counts the query itself, we count the positions before it
    window = q.shape[1] if sliding_window_length is None else sliding_window_length - 1
    out = attention.attention(q, k, v, window=window, implementation="reference")
    statistics = jnp.zeros((len(q), q.shape[2], q.shape[1]), jnp.float32)
    return (out, statistics) if is_training else (out,)


def backward(q, k, v, *rest, sliding_window_length, **_others):
    whole = partial(forward, sliding_window_length=sliding_window_length, is_training=False)
    return jax.vjp(lambda *x: whole(*x)[0], q, k, v)[1](rest[-1])


@pytest.fixture
def on_cpu(monkeypatch):
    """cuDNN's two kernels, as if this CPU had them; the set of those that were compiled."""
    version = SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(cudnn, "cuda_versions", version)
    compiled = set()

    def stand_in(kernel, function):
        def lowered(*arguments, **options):
            compiled.add(function.__name__)
            return function(*arguments, **options)

        mlir.register_lowering(kernel, mlir.lower_fun(lowered), platform="cpu")

    stand_in(cudnn._dot_product_attention_fwd_p, forward)
    stand_in(cudnn._dot_product_attention_bwd_p, backward)
    return compiled


def compare_steps(config, dtype, length, sizes, kernel, monkeypatch, tolerance):
    """Loss and gradients of a training step with `kernel` are those with the reference."""
    graphdef, params = split(make_perturbed(config))
    graphdef = split(GPT(config, dtype))[0]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 8, length + 1), np.int32)
    batch = (ids[..., :-1], ids[..., 1:], None)

    def results(kernel):
        monkeypatch.setattr(attention, "default_implementation", lambda *_: kernel)
        step = jax.jit(lambda p, b: loss_and_grads(graphdef, p, b, mesh_of(sizes)))
        return jax.tree.leaves(step(params, batch))

    for ours, oracle in zip(results(kernel), results("reference"), strict=True):
        error = np.linalg.norm(ours - oracle) / np.linalg.norm(oracle)
        assert error < tolerance  # the compiler cuts products


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_step_on_a_mesh_may_call_cudnn(sizes, on_cpu, monkeypatch):
    """In float16: the gradients of scalars are sums that bfloat16 rounds by 6%, on some CPUs."""
    compare_steps(CONFIG, jnp.float16, 160, sizes, "cudnn", monkeypatch, 1e-2)
    assert on_cpu == {"forward", "backward"}


def test_a_step_on_a_mesh_may_call_the_kernels_of_a_tpu(monkeypatch):
    compare_steps(WIDE, jnp.float32, 128, SIZES[-1], "splash", monkeypatch, 1e-5)


@pytest.mark.parametrize(
    ("length", "window", "heads", "kv_heads"), [(256, 90, 4, 2), (384, 999, 2, 2)]
)
def test_the_kernels_of_a_tpu_equal_the_reference(length, window, heads, kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    q, cotangent = (jax.random.normal(key, (2, length, heads, 128)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, kv_heads, 128)) for key in keys[2:])

    def results(kernel):
        attend = partial(attention.attention, window=window, implementation=kernel)
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(cotangent)

    for ours, oracle in zip(results("splash"), results("reference"), strict=True):
        np.testing.assert_allclose(ours, oracle, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "kernel"),
    [
        ("bfloat16", 128, "8.6", "cudnn"),
        ("float16", 64, "8.0", "cudnn"),
        ("float32", 128, "9.0", "blocked"),
        ("bfloat16", 100, "9.0", "blocked"),
        ("bfloat16", 192, "9.0", "cudnn"),
        ("bfloat16", 192, "8.9", "blocked"),
        ("bfloat16", 264, "9.0", "blocked"),
        ("float16", 64, "7.5", "blocked"),  # a T4
        ("bfloat16", 128, "gfx942", "blocked"),  # AMD's
    ],
)
def test_cudnn_is_chosen_for_what_it_can_do(dtype, head_dim, capability, kernel, monkeypatch):
    pretend_gpu(monkeypatch, capability)
    assert attention.default_implementation(jnp.dtype(dtype), 100, head_dim) == kernel


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    card = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [card])


@pytest.mark.parametrize(
    ("capability", "computed", "iterated"),
    [
        ("7.5", "float32", "float32"),
        ("8.0", "bfloat16", "bfloat16"),
        ("gfx942", "bfloat16", "bfloat16"),
    ],
)
def test_half_precision_is_for_cards_that_are_fast_in_it(
    capability, computed, iterated, monkeypatch
):
    pretend_gpu(monkeypatch, capability)
    monkeypatch.delenv("JAXCHAT_DTYPE", raising=False)
    assert devices.compute_dtype() == computed
    assert jnp.dtype(devices.iteration_dtype()) == iterated


@pytest.mark.parametrize(("dtype", "asked"), [("float32", "highest"), ("bfloat16", None)])
def test_products_of_float32_are_float32_on_a_gpu_too(dtype, asked, monkeypatch):
    """JAX's own default is TF32 there; PyTorch's is not."""
    pretend_gpu(monkeypatch, "9.0")
    seen = {}
    monkeypatch.setattr(jax.config, "update", seen.__setitem__)
    devices.multiply_in(jnp.dtype(dtype))
    assert seen.get("jax_default_matmul_precision") == asked


@pytest.mark.parametrize(
    ("length", "head_dim", "devices", "cut", "kernel"),
    [
        (2048, 128, 1, set(), "splash"),
        (2048, 128, 8, {"tensor"}, "splash"),
        (2048, 128, 8, set(), "blocked"),  # an evaluation, which the compiler divides
        (2000, 128, 1, set(), "blocked"),
        (2048, 64, 1, set(), "blocked"),
    ],
)
def test_the_kernels_of_a_tpu_are_chosen_for_what_they_can_do(
    length, head_dim, devices, cut, kernel, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(sharding, "left_to_the_compiler", lambda: cut)
    assert attention.default_implementation(jnp.bfloat16, length, head_dim) == kernel
