"""The sampler: its definition in numpy, and the device's version held to it."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat import device_sampling, sampling
from jaxchat.sampling_params import MAX_TOP_K, SamplingParams
from torch_ref import device_sampling as torch_sampling

VOCAB = 300
ROWS = 8


@jax.jit
def sample_on_device(logits, params, uniforms):
    tokens = device_sampling.sample(logits, params, uniforms)
    return tokens, device_sampling.logprob(logits, tokens)


filter_on_device = jax.jit(device_sampling.filtered_weights)


def random_logits(seed, rows=ROWS, vocab=VOCAB):
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def on_device(logits, params, uniforms):
    tokens, logprobs = sample_on_device(
        jnp.asarray(logits), device_sampling.row_params(params), jnp.asarray(uniforms, jnp.float32)
    )
    return np.asarray(tokens), np.asarray(logprobs)


def weights_on_device(logits, params):
    rows = device_sampling.row_params(params)
    return np.asarray(filter_on_device(jnp.asarray(logits), rows))


def distance_to_boundary(logits, params, uniform):
    """How far a uniform number is from one that would draw another token."""
    ends = np.cumsum(sampling.filtered_weights(logits, params).astype(np.float64))
    return np.abs(ends / ends[-1] - uniform).min()


COMBINATIONS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.0, 0.3, 1.0, 5.0), (None, 0, 1, 7, VOCAB, 10**6), (1.0, 0.9, 1e-6), (0.0, 0.2, 1.0)
    )
]


def test_device_and_definition_keep_and_draw_the_same_tokens_for_all_combinations():
    differing = 0
    for start in range(0, len(COMBINATIONS), ROWS):
        params = COMBINATIONS[start : start + ROWS]
        logits = random_logits(start)
        uniforms = np.random.default_rng(start).random(ROWS).astype(np.float32)
        tokens, logprobs = on_device(logits, params, uniforms)
        weights = weights_on_device(logits, params)
        for row, one in enumerate(params):
            if one.temperature:
                expected = sampling.filtered_weights(logits[row], one)
                np.testing.assert_allclose(weights[row], expected, rtol=2e-5, err_msg=str(one))
            token = sampling.sample(logits[row], one, uniforms[row])
            if tokens[row] != token:
                differing += 1
                assert distance_to_boundary(logits[row], one, uniforms[row]) < 1e-6, one
            expected = sampling.logprob(logits[row], tokens[row])
            assert logprobs[row] == pytest.approx(expected, abs=1e-5)
    assert differing <= 1  # one draw in a million falls between two roundings


def test_draws_follow_the_distribution():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)).repeat(4096, axis=0)
    uniforms = sampling.uniforms(7, 0, 0, 4096)
    tokens, _ = on_device(logits, [SamplingParams()] * 4096, uniforms)
    assert [sampling.sample(logits[0], SamplingParams(), u) for u in uniforms] == tokens.tolist()
    counts = Counter(tokens.tolist())
    for token, share in enumerate((0.5, 0.25, 0.125, 0.125)):
        assert counts[token] / 4096 == pytest.approx(share, abs=0.03)


def test_top_p_is_reached_by_a_sum_that_equals_it():
    """Half of the mass in one token is enough for 0.5."""
    logits = np.log(np.array([0.5, 0.25, 0.25], np.float32) + np.float32(0))
    kept = sampling.filtered_weights(logits, SamplingParams(top_k=None, top_p=0.5))
    assert np.flatnonzero(kept).tolist() == [0]


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [17, 200]] = 1
    greedy = SamplingParams(temperature=0.0)
    assert on_device(logits, [greedy], [0.99])[0].tolist() == [17]
    assert sampling.sample(logits[0], greedy, np.float32(0.99)) == 17


def test_of_alternatives_that_tie_the_lowest_id_comes_first():
    logits = np.zeros(VOCAB, np.float32)
    logits[[7, 250, 40]] = 2.0, 2.0, 3.0
    found = sampling.alternatives(logits, 5)
    assert [token for token, _ in found] == [40, 7, 250, 0, 1]
    assert found[1][1] == found[2][1] == sampling.logprob(logits, 7)


@pytest.mark.parametrize(
    "params", [SamplingParams(top_k=2), SamplingParams(top_p=0.34), SamplingParams(min_p=1.0)]
)
def test_all_tokens_that_tie_with_the_last_one_kept_stay(params):
    logits = np.full((1, VOCAB), -20.0, np.float32)
    logits[0, [3, 150, 299]] = 2.0
    kept = [3, 150, 299]
    assert np.flatnonzero(sampling.filtered_weights(logits[0], params)).tolist() == kept
    assert np.flatnonzero(weights_on_device(logits, [params])[0]).tolist() == kept


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
def test_rounding_never_lets_a_filtered_token_through(uniform):
    logits = random_logits(3)
    params = [SamplingParams(top_k=k, temperature=3.0) for k in (1, 2, 3, 5, 8, 20, 100, 250)]
    tokens, _ = on_device(logits, params, np.full(ROWS, uniform))
    kept = weights_on_device(logits, params) > 0
    assert kept[np.arange(ROWS), tokens].all()
    for row, one in enumerate(params):
        token = sampling.sample(logits[row], one, np.float32(uniform))
        assert sampling.filtered_weights(logits[row], one)[token] > 0


def test_where_rounding_leaves_no_sum_above_a_number_the_last_token_kept_is_drawn():
    ends, weights = np.array([1, 2, 2], np.float32), np.array([1, 1, 0], np.float32)
    drawn = [sampling._first_above(np.float32(x), ends, weights) for x in (0, 1, 2, 3)]
    assert drawn == [0, 1, 1, 1]


@pytest.mark.parametrize("temperature", [1e-40, 1e-10, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    logits = random_logits(5)
    params = [SamplingParams(temperature=temperature)] * ROWS
    tokens, _ = on_device(logits, params, np.full(ROWS, 0.5))
    if temperature < 1:
        np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    assert np.isfinite(weights_on_device(logits, params)).all()


LEAST = 5e-324
"""The smallest positive Python float; a float32 reads it as 0."""

EXTREMES = [
    *(SamplingParams(temperature=x) for x in (LEAST, 1e-40, 1e-38, 1e-30, 1e38)),
    *(SamplingParams(top_p=x) for x in (LEAST, 1e-40, 1e-38, 1e-30, 1 - 2**-53)),
    *(SamplingParams(min_p=x) for x in (LEAST, 1e-40)),
    SamplingParams(temperature=LEAST, top_k=MAX_TOP_K, top_p=LEAST, min_p=LEAST),
]


def in_torch(logits, params, uniforms):
    """Tokens and weights, as PyTorch has them."""
    rows, on_cpu = torch_sampling.row_params(params, torch.device("cpu")), torch.tensor(logits)
    tokens = torch_sampling.sample(on_cpu, rows, torch.tensor(uniforms))
    return tokens.numpy(), torch_sampling.filtered_weights(on_cpu, rows).numpy()


@pytest.mark.parametrize("name", ["jax", "torch"])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_extreme_parameters_keep_and_draw_what_the_definition_does(name, uniform):
    logits = random_logits(6, rows=len(EXTREMES))
    logits[:, [40, 200]] = 20  # of two best tokens no filter may drop one
    uniforms = np.full(len(EXTREMES), uniform, np.float32)
    if name == "jax":
        tokens, _ = on_device(logits, EXTREMES, uniforms)
        weights = weights_on_device(logits, EXTREMES)
    else:
        tokens, weights = in_torch(logits, EXTREMES, uniforms)
    for row, one in enumerate(EXTREMES):
        expected = sampling.filtered_weights(logits[row], one)
        np.testing.assert_allclose(weights[row], expected, rtol=2e-5, err_msg=str(one))
        assert tokens[row] == sampling.sample(logits[row], one, uniforms[row]), one


def test_top_k_ends_where_a_device_counts_no_further():
    assert device_sampling.row_params([SamplingParams(top_k=2**31 - 1)]).top_k == 2**31 - 1
    with pytest.raises(ValueError, match=f"top_k={2**31}"):
        SamplingParams(top_k=2**31)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_a_uniform_number_depends_on_its_own_keys_only(seed, row, position):
    many = sampling.uniforms(seed, row, position, 5)
    assert ((many >= 0) & (many < 1)).all()
    assert many[3] == sampling.uniform(seed, row, position + 3)


def test_uniform_numbers_match_splitmix64():
    """Pinned: changing the generator changes every sampled text of every user."""

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    state = 0
    for key in (2**63 - 1, 5, 123456):
        state = mix(((state ^ key) + 0x9E3779B97F4A7C15) % 2**64)
    assert float(sampling.uniform(2**63 - 1, 5, 123456)) == (state >> 40) / 2**24
    assert float(sampling.uniform(0, 0, 0)) == pytest.approx(0.13870937)


def test_uniform_numbers_are_uniform_and_independent_across_rows():
    table = np.stack([sampling.uniforms(0, row, 0, 2000) for row in range(4)])
    np.testing.assert_allclose(table.mean(axis=1), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(table) - np.eye(4)).max() < 0.1
