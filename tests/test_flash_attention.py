"""cuDNN's attention as a training step calls it, on meshes: its kernel stands in for by XLA's.

What is real here is everything around the kernel: the checks, the call that JAX cuts along a mesh
by rules of its own, and its gradient. Those once refused every mesh of more than one device.
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

from jaxchat import attention, devices
from jaxchat.gpt import GPT
from jaxchat.params import split
from jaxchat.train_step import loss_and_grads
from tests.models import MODERN, make_perturbed
from tests.test_sharding import SIZES, mesh_of

CONFIG = replace(MODERN, n_layer=2, window_pattern="SL")


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


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_step_on_a_mesh_may_call_cudnn(sizes, on_cpu, monkeypatch):
    graphdef, params = split(make_perturbed(CONFIG))
    graphdef = split(GPT(CONFIG, jnp.bfloat16))[0]
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 8, 161), np.int32)
    batch = (ids[..., :-1], ids[..., 1:], None)

    def results(kernel):
        monkeypatch.setattr(attention, "default_implementation", lambda *_: kernel)
        step = jax.jit(lambda p, b: loss_and_grads(graphdef, p, b, mesh_of(sizes)))
        return jax.tree.leaves(step(params, batch))

    for ours, oracle in zip(results("cudnn"), results("reference"), strict=True):
        error = np.linalg.norm(ours - oracle) / np.linalg.norm(oracle)
        assert error < 2e-2  # of bfloat16, where the compiler cuts products
    assert on_cpu == {"forward", "backward"}


@pytest.mark.parametrize(
    ("dtype", "head_dim", "hopper", "kernel"),
    [
        ("bfloat16", 128, False, "cudnn"),
        ("float16", 64, False, "cudnn"),
        ("float32", 128, True, "blocked"),
        ("bfloat16", 100, True, "blocked"),
        ("bfloat16", 192, True, "cudnn"),
        ("bfloat16", 192, False, "blocked"),
        ("bfloat16", 264, True, "blocked"),
    ],
)
def test_cudnn_is_chosen_for_what_it_can_do(dtype, head_dim, hopper, kernel, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(devices, "since_hopper", lambda: hopper)
    assert attention.default_implementation(jnp.dtype(dtype), head_dim) == kernel
