"""Both backends continue the same prompts with the same tokens, through their caches."""

import numpy as np
import pytest

from jaxchat import sampling
from jaxchat.backend import DecodeBatch
from jaxchat.config import SamplingParams
from jaxchat.jax_backend import JaxBackend
from tests.parity.twins import CONFIGS, max_abs, perturbed_weights
from torch_ref.torch_backend import TorchBackend

NEW_TOKENS = 200

PER_DISPATCH = 48

PROMPT_LENGTHS = (3, 150, 40)
"""Rows of one batch: ragged, and one longer than the short window."""

KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "top-k 50, temperature 0.8": SamplingParams(temperature=0.8, top_k=50, seed=7),
    "top-p 0.9, min-p 0.02": SamplingParams(top_p=0.9, min_p=0.02, seed=8),
}


@pytest.fixture(scope="module")
def backends():
    """Both backends with the same weights, JAX on one device."""
    config = CONFIGS["modern"]
    params = perturbed_weights(config)
    ours = JaxBackend(config, dtype="float32", device=0)
    theirs = TorchBackend(config, dtype="float32")
    for backend in (ours, theirs):
        backend.set_params(params)
    return ours, theirs


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, n, dtype=np.int32) for n in PROMPT_LENGTHS]


def continue_prompts(backend, params, new_tokens=NEW_TOKENS):
    """So many new tokens of every prompt, all rows in one cache, and their log-probabilities."""
    cache = backend.new_cache(len(PROMPT_LENGTHS), 384)
    rows, scores = [], []
    for row, ids in enumerate(prompts()):
        cache, logits = backend.prefill(cache, row, ids, 0)
        token = sampling.sample(logits, params, sampling.uniform(params.seed, row, len(ids)))
        rows.append([*ids.tolist(), token])
    while (left := PROMPT_LENGTHS[0] + new_tokens - len(rows[0])) > 0:
        batch = dispatch(rows, params, min(PER_DISPATCH, left))
        result = backend.decode(cache, batch)
        cache = result.cache
        assert (result.counts == batch.budgets).all()
        for row, tokens in zip(rows, result.tokens, strict=True):
            row.extend(tokens[: result.counts[0]].tolist())
        scores.append(result.logprobs[:, : result.counts[0]])
    return rows, np.hstack(scores)


def dispatch(rows, params, budget):
    lengths = np.array([len(row) - 1 for row in rows], np.int32)
    return DecodeBatch(
        tokens=np.array([row[-1] for row in rows], np.int32),
        lengths=lengths,
        budgets=np.full(len(rows), budget, np.int32),
        uniforms=np.stack(
            [
                sampling.uniforms(params.seed, row, int(length) + 1, PER_DISPATCH)
                for row, length in enumerate(lengths)
            ]
        ),
        prompt_lengths=np.array(PROMPT_LENGTHS, np.int32),
        params=(params,) * len(rows),
        stop_ids=frozenset(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens(backends, kind, parity):
    ours, theirs = backends
    expected, expected_scores = continue_prompts(ours, KINDS[kind])
    tokens, scores = continue_prompts(theirs, KINDS[kind])
    differing = np.sum(np.hstack(tokens) != np.hstack(expected))
    parity(f"tokens that differ of {NEW_TOKENS} x {len(tokens)}, {kind}", differing, 0)
    parity("log-probabilities while decoding (absolute)", max_abs(scores, expected_scores), 1e-5)


def test_cached_decoding_equals_the_slow_oracle(backends):
    """`generate` re-reads everything for every token; 20 tokens of the longest prompt."""
    params = SamplingParams(max_tokens=20, temperature=0.8, top_k=50, seed=7)
    _, theirs = backends
    oracle = list(theirs.model.generate(prompts()[1].tolist(), params, row=1))
    tokens, _ = continue_prompts(theirs, params, new_tokens=20)
    assert tokens[1][PROMPT_LENGTHS[1] :] == oracle


def test_rewound_and_copied_rows_continue_alike(backends, parity):
    """Row 1 is cut back to 100 tokens and continued; row 2 is a copy of that prefix, continued."""
    ids = prompts()[1]
    logits = []
    for backend in backends:
        cache = backend.new_cache(3, 256)
        cache, _ = backend.prefill(cache, 1, ids, 0)
        cache = backend.copy_row(cache, 1, 2, 100)
        cache, rewound = backend.prefill(cache, 1, ids[100:120], 100)
        cache, copied = backend.prefill(cache, 2, ids[100:120], 100)
        cache, fresh = backend.prefill(cache, 0, ids[:120], 0)
        logits.append(fresh)
        for continued in (rewound, copied):
            parity("logits, rewound or copied row against fresh", max_abs(continued, fresh), 1e-5)
    parity("logits after a prefill, between the backends", max_abs(*logits), 1e-5)
