"""The model as a textbook would write it: float64, one position at a time, without a cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.params import bind, split
from tests.models import CLASSIC, MODERN, make_perturbed


def textbook(p, c, ids):
    """Logits of one text by nanochat's architecture, the modern one (92d63d4) or the classic."""
    p = {name: np.asarray(x, np.float64) for name, x in p.items()}

    def norm(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    T, C, modern = len(ids), c.n_embd // c.n_head, c.smear
    x = norm(p["wte.weight"][ids])
    if modern:
        gate = sigmoid(x[1:, :24] @ p["smear_gate.weight"].T)
        x = np.concatenate([x[:1], x[1:] + p["smear_lambda"] * gate * x[:-1]])
    angle = np.arange(T)[:, None] * c.rope_base ** (-np.arange(0, C, 2) / C)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotated(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)

    x0 = x
    for i in range(c.n_layer):
        if modern:
            x = p["resid_lambdas"][i] * x + p["x0_lambdas"][i] * x0

        def w(name, i=i):
            return p[f"h.{i}.{name}.weight"].T

        h = norm(x)
        q, k, v = ((h @ w(f"attn.c_{n}")).reshape(T, -1, C) for n in "qkv")
        if modern and i % 2 == (c.n_layer - 1) % 2:
            gate = 3 * sigmoid(h[:, :12] @ w("attn.ve_gate"))
            v = v + gate[..., None] * p[f"value_embeds.{i}.weight"][ids].reshape(v.shape)
        q, k = (c.qk_gain * norm(rotated(x)) for x in (q, k))
        short = -(-c.sequence_len // 4 // 128) * 128
        letters = c.window_pattern[i % len(c.window_pattern)]
        window = c.sequence_len if letters == "L" or i == c.n_layer - 1 else short
        y = np.zeros_like(q)
        for t in range(T):
            for head in range(c.n_head):
                kv, seen = head // (c.n_head // c.n_kv_head), slice(max(0, t - window), t + 1)
                s = np.exp(k[seen, kv] @ q[t, head] / np.sqrt(C))
                y[t, head] = s @ v[seen, kv] / s.sum()
        x = x + y.reshape(T, -1) @ w("attn.c_proj")
        x = x + np.maximum(norm(x) @ w("mlp.c_fc"), 0) ** 2 @ w("mlp.c_proj")
        if i == c.n_layer // 2:
            middle = x
    if modern:
        x = x - p["backout_lambda"] * middle
    logits = norm(x) @ p["lm_head.weight"][: c.vocab_size].T
    return 15 * np.tanh(logits / 15)


@pytest.mark.parametrize("config", [replace(MODERN, n_layer=3), CLASSIC], ids=["modern", "classic"])
def test_the_model_is_what_it_is_said_to_be(config):
    graphdef, params = split(make_perturbed(config))
    ids = np.random.default_rng(0).integers(0, 300, 200)
    logits = jax.jit(lambda p, i: bind(graphdef, p)(i))(params, jnp.asarray(ids[None]))[0]
    np.testing.assert_allclose(logits, textbook(params, config, ids), atol=2e-5)
