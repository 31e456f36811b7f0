"""Small models for tests: every switch and shape, no weight at a value that hides a bug."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from jaxchat.config import GPTConfig
from jaxchat.gpt import GPT
from jaxchat.params import Params, bind, split

MODERN = GPTConfig(
    sequence_len=256,
    vocab_size=300,
    n_layer=4,
    n_head=4,
    n_kv_head=2,
    n_embd=64,
    window_pattern="SSSL",
)
"""Grouped queries, and a short window (128) below the sequence length."""

CLASSIC = replace(MODERN, n_kv_head=4).classic()

PRESETS = {"modern": MODERN, "classic": CLASSIC}


def make_model(config: GPTConfig, *, seed: int = 0) -> GPT:
    """A freshly initialised model."""
    return bind(split(GPT(config))[0], jax.jit(lambda: split(_init(config, seed))[1])())


def make_perturbed(config: GPTConfig, *, seed: int = 0, scale: float = 0.1) -> GPT:
    """A model whose zero-initialised weights are not zero: projections, gates, lambdas."""

    def draw() -> Params:
        _, params = split(_init(config, seed))
        keys = jax.random.split(jax.random.key(seed + 1), len(params))
        return {
            name: value + scale * jax.random.normal(key, value.shape)
            for key, (name, value) in zip(keys, params.items(), strict=True)
        }

    return bind(split(GPT(config))[0], jax.jit(draw)())


def shaken(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A backend's weights, each with noise that is the same every time."""
    rng = np.random.default_rng(0)
    return {
        name: params[name] + rng.normal(0, 0.1, params[name].shape).astype(np.float32)
        for name in sorted(params)
    }


def assert_same_arrays(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Weights or moments under the same names, bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def _init(config: GPTConfig, seed: int) -> GPT:
    model = GPT(config)
    model.init_weights(nnx.Rngs(seed))
    return model
