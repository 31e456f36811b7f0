"""Chunked cross-entropy against the plain formula and JAX's own differentiation of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import loss
from jaxchat.config import MAX_SOFTCAP


def plain(hidden, lm_head, targets, weights, vocab_size, softcap):
    logits = softcap * jnp.tanh(hidden @ lm_head[:vocab_size].T / softcap)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * picked)


@pytest.fixture(params=[64, 100], ids=["whole vocabulary", "padded vocabulary"])
def problem(request, monkeypatch):
    """Several chunks, the last not full: 3 rows of 23 tokens, at most 16 at a time."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", {"cpu": 0})
    monkeypatch.setattr(loss, "LEAST_CHUNK_TOKENS", 16)
    keys = jax.random.split(jax.random.key(0), 4)
    rows = -(-request.param // 64) * 64
    hidden = jax.random.normal(keys[0], (3, 23, 8))
    lm_head = jax.random.normal(keys[1], (rows, 8))
    targets = jax.random.randint(keys[2], (3, 23), 0, request.param)
    targets = targets.at[0, :7].set(-1)
    weights = (targets >= 0).astype(jnp.float32) * jax.random.uniform(keys[3], (3, 23))
    return hidden, lm_head, targets, weights, request.param, 15.0


def test_loss_equals_the_plain_formula(problem):
    np.testing.assert_allclose(loss.cross_entropy(*problem), plain(*problem), rtol=1e-6)


def test_gradients_equal_automatic_ones(problem):
    ours = jax.grad(loss.cross_entropy, argnums=(0, 1))(*problem)
    oracle = jax.grad(plain, argnums=(0, 1))(*problem)
    for mine, theirs in zip(ours, oracle, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_saturated_logits_at_the_highest_cap(problem):
    """Nothing is subtracted before the exponentials: the cap alone keeps them in float32."""
    hidden, lm_head, targets, weights, vocab_size, _ = problem
    extreme = (1e3 * hidden, lm_head, targets, weights, vocab_size, MAX_SOFTCAP)
    value, gradient = jax.value_and_grad(loss.cross_entropy, argnums=1)(*extreme)
    oracle, expected = jax.value_and_grad(plain, argnums=1)(*extreme)
    assert float(oracle) > 100
    np.testing.assert_allclose(value, oracle, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-3)


def test_gradients_scale_with_what_comes_after(problem):
    one = jax.grad(lambda h: loss.cross_entropy(h, *problem[1:]))(problem[0])
    three = jax.grad(lambda h: 3 * loss.cross_entropy(h, *problem[1:]))(problem[0])
    np.testing.assert_allclose(three, 3 * one, rtol=1e-5)


def test_a_prime_number_of_tokens_makes_no_smaller_chunks():
    """Chunks once had to divide the tokens: 8 rows of 509 were cut into single columns."""
    hidden = jnp.zeros((8, 509, 2))
    for cut in (loss._flat_chunks, loss._time_chunks):
        (chunks,) = cut(8192, hidden)
        assert chunks[0].size // 2 >= 250
        assert chunks.size // 2 < 8 * 509 + 8 * len(chunks)


def test_tanh_of_gpus_is_tanh(monkeypatch):
    x = jnp.concatenate([jnp.linspace(-9, 9, 1001), jnp.array([-1e30, -200.0, 200.0, 1e30])])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(loss._tanh(x), np.tanh(np.asarray(x, np.float64)), atol=1e-6)


def test_ignored_tokens_have_no_gradient(problem):
    gradient = jax.grad(loss.cross_entropy)(*problem)
    assert not np.any(gradient[0, :7])
    assert np.all(np.abs(gradient[1]).sum(axis=-1) > 0)


def test_scores_are_the_plain_log_probabilities_and_argmax(problem):
    hidden, lm_head, targets, _, vocab_size, softcap = problem
    nll, greedy = loss.token_scores(
        hidden, lm_head, targets, vocab_size=vocab_size, softcap=softcap
    )
    logits = softcap * jnp.tanh(hidden @ lm_head[:vocab_size].T / softcap)
    np.testing.assert_array_equal(greedy, jnp.argmax(logits, axis=-1))
    for b, t in [(0, 0), (0, 8), (1, 15), (2, 19)]:
        alone = jnp.zeros((3, 23)).at[b, t].set(float(targets[b, t] >= 0))
        expected = plain(hidden, lm_head, targets, alone, vocab_size, softcap)
        assert float(nll[b, t]) == pytest.approx(float(expected), abs=1e-5)


def test_no_buffer_of_all_logits_exists():
    """The jaxpr holds nothing of B x T x V elements."""
    shapes = (
        jax.ShapeDtypeStruct((4, 4096, 8), jnp.float32),
        jax.ShapeDtypeStruct((640, 8), jnp.float32),
        jax.ShapeDtypeStruct((4, 4096), jnp.int32),
        jax.ShapeDtypeStruct((4, 4096), jnp.float32),
    )
    step = jax.grad(lambda *xs: loss.cross_entropy(*xs, 640, 15.0), argnums=(0, 1))
    compiled = jax.jit(step).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 640 * 4
