"""Every kernel against the textbook, written out position by position in numpy."""

import jax
import numpy as np
import pytest

from jaxchat.attention import attention


def textbook(q, k, v, window):
    """Softmax attention, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows, length, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(rows, length, heads):
        seen = slice(max(0, t - window), t + 1)
        scores = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("kernel", ["reference", "blocked"])
@pytest.mark.parametrize(("length", "window"), [(1, 0), (40, 1), (40, 999), (300, 5), (300, 140)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_kernels_equal_the_textbook(kernel, window, length, heads, kv_heads):
    keys = jax.random.split(jax.random.key(length), 3)
    q = jax.random.normal(keys[0], (1, length, heads, 8))
    k, v = (jax.random.normal(key, (1, length, kv_heads, 8)) for key in keys[1:])
    compute = jax.jit(attention, static_argnames=("window", "implementation"))
    out = compute(q, k, v, window=window, implementation=kernel)
    np.testing.assert_allclose(out, textbook(q, k, v, window), atol=2e-6)


def test_blocked_has_the_gradients_of_the_reference():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 300, 2, 8)) for key in keys)

    def loss(kernel):
        def total(q, k, v):
            return (attention(q, k, v, window=70, implementation=kernel) ** 2).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)

    for ours, oracle in zip(loss("blocked"), loss("reference"), strict=True):
        np.testing.assert_allclose(ours, oracle, atol=1e-5)


def test_an_unknown_kernel_is_named():
    x = jax.numpy.zeros((1, 2, 1, 8))
    with pytest.raises(ValueError, match="'flash': choose cudnn, splash, blocked or reference"):
        attention(x, x, x, window=4, implementation="flash")
