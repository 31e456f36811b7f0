"""Both backends continue the same prompts with the same tokens, through their caches."""

import numpy as np
import pytest

from jaxchat import sampling
from jaxchat.backend import DecodeBatch
from jaxchat.jax_backend import JaxBackend
from jaxchat.sampling_params import SamplingParams
from tests.parity.twins import CONFIGS, max_abs, perturbed_weights
from torch_ref.torch_backend import TorchBackend

NEW_TOKENS = 200

PER_DISPATCH = 48

ROWS = {
    "greedy": (150, SamplingParams(temperature=0.0)),
    "top-k and temperature": (3, SamplingParams(temperature=0.8, top_k=50, seed=7)),
    "top-p and min-p": (40, SamplingParams(top_p=0.9, min_p=0.02, seed=8)),
}
"""The prompt lengths and parameters of one batch: ragged, one longer than the short window, the
others crossing it."""


@pytest.fixture(scope="module", params=["modern", "classic"])
def backends(request):
    """Both backends with the same weights, JAX on one device."""
    config = CONFIGS[request.param]
    ours = JaxBackend(config, dtype="float32", device=0)
    theirs = TorchBackend(config, dtype="float32")
    for backend in (ours, theirs):
        backend.set_params(perturbed_weights(config))
    return ours, theirs


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, length, dtype=np.int32) for length, _ in ROWS.values()]


def continue_prompts(backend, new_tokens):
    """So many new tokens of every prompt, all rows in one cache, and their log-probabilities."""
    cache = backend.new_cache(len(ROWS), 384)
    rows, scores = [], []
    for row, (ids, (_, params)) in enumerate(zip(prompts(), ROWS.values(), strict=True)):
        cache, logits = backend.prefill(cache, row, ids, 0)
        token = sampling.sample(logits, params, sampling.uniform(params.seed, row, len(ids)))
        rows.append([token])
    while (left := new_tokens - len(rows[0])) > 0:
        batch = dispatch(rows, min(PER_DISPATCH, left))
        result = backend.decode(cache, batch)
        cache = result.cache
        assert (result.counts == batch.budgets).all()
        for row, tokens in zip(rows, result.tokens, strict=True):
            row.extend(tokens[: result.counts[0]].tolist())
        scores.append(result.logprobs[:, : result.counts[0]])
    return rows, np.hstack(scores)


def dispatch(rows, budget):
    """The next tokens of all replies, which are in the cache but for their newest."""
    starts = np.array([length for length, _ in ROWS.values()], np.int32)
    params = tuple(params for _, params in ROWS.values())
    lengths = starts + np.array([len(row) - 1 for row in rows], np.int32)
    uniforms = [
        sampling.uniforms(p.seed, row, int(length) + 1, PER_DISPATCH)
        for row, (p, length) in enumerate(zip(params, lengths, strict=True))
    ]
    return DecodeBatch(
        tokens=np.array([row[-1] for row in rows], np.int32),
        lengths=lengths,
        budgets=np.full(len(rows), budget, np.int32),
        uniforms=np.stack(uniforms),
        prompt_lengths=starts,
        params=params,
        stop_ids=frozenset(),
    )


def test_same_tokens(backends, parity):
    ours, theirs = backends
    expected, expected_scores = continue_prompts(ours, NEW_TOKENS)
    tokens, scores = continue_prompts(theirs, NEW_TOKENS)
    for kind, mine, wanted in zip(ROWS, tokens, expected, strict=True):
        differing = np.sum(np.array(mine) != wanted)
        parity(f"{kind}: tokens that differ, of {len(wanted)}", differing)
        assert len(set(wanted)) > 10  # not one token again and again
    parity("log-probabilities of sampled tokens", max_abs(scores, expected_scores))


def test_cached_decoding_equals_the_slow_oracle(backends):
    """`generate` re-reads everything for every token."""
    _, theirs = backends
    tokens, _ = continue_prompts(theirs, 20)
    for row, (ids, (_, params)) in enumerate(zip(prompts(), ROWS.values(), strict=True)):
        oracle = theirs.model.generate(ids.tolist(), params, row=row)
        assert [next(oracle) for _ in range(20)] == tokens[row]


def test_rewound_and_copied_rows_continue_alike(backends, parity):
    """Row 1 is cut back to 100 tokens and continued; row 2 is a copy of that prefix, continued."""
    ids = prompts()[0]
    logits = []
    for backend in backends:
        cache = backend.new_cache(len(ROWS), 384)
        cache, _ = backend.prefill(cache, 1, ids, 0)
        cache = backend.copy_row(cache, 1, 2, 100)
        cache, rewound = backend.prefill(cache, 1, ids[100:120], 100)
        cache, copied = backend.prefill(cache, 2, ids[100:120], 100)
        cache, fresh = backend.prefill(cache, 0, ids[:120], 0)
        logits.append(fresh)
        for continued in (rewound, copied):
            parity("logits through the caches", max_abs(continued, fresh), "rewound or copied")
    parity("logits through the caches", max_abs(*logits), "between the backends")
