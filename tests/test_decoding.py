"""Prefill and decode on the device against the model without a cache, the slow oracle.

All models are perturbed: with zero output projections, lambdas or gates a wrong cache would give
the right logits.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat import decoding, kv_cache, sampling
from jaxchat.backend import DecodeBatch
from jaxchat.gpt import GPT
from jaxchat.jax_backend import JaxBackend
from jaxchat.params import split
from jaxchat.sampling_params import SamplingParams
from tests.models import CLASSIC, MODERN, make_perturbed

SMALL = replace(MODERN, window_pattern="SSL", n_layer=3)
"""Short layers with value embeddings and without, and a middle layer that is not the last."""

CONFIGS = {
    "modern": SMALL,
    "classic": replace(CLASSIC, n_layer=2),
    "all short": replace(SMALL, window_pattern="S", n_kv_head=1),
    "alternating": replace(SMALL, window_pattern="SL", n_layer=2, n_kv_head=4),
}
LENGTH = 256
ROWS = 3
N = 6
NONE = frozenset()
TEXT = np.random.default_rng(0).integers(0, 300, LENGTH).astype(np.int32)


@pytest.fixture(autouse=True)
def few_chunk_lengths(monkeypatch):
    """Two programs per model instead of five, and long texts are read in chunks."""
    monkeypatch.setattr(decoding, "CHUNK_LENGTHS", (16, 128))


@cache
def setup(name="modern"):
    """A decoder, its weights, its model and the logits at every position of TEXT, uncached."""
    model = make_perturbed(CONFIGS[name])
    graphdef, params = split(model)
    logits = np.asarray(jax.jit(lambda ids: model(ids))(jnp.asarray(TEXT[None])))[0]
    return decoding.Decoder(graphdef, model.config), params, model, logits


def new_cache(name="modern", rows=ROWS):
    return kv_cache.make_cache(CONFIGS[name], rows, LENGTH, jnp.dtype("float32"))


def batch_of(requests, *, budgets=None, stop_ids=NONE, steps=N):
    """A `DecodeBatch` from (ids so far, SamplingParams, row key) or None for each row."""
    lengths = np.array([len(r[0]) - 1 if r else 0 for r in requests], np.int32)
    uniforms = np.zeros((len(requests), steps), np.float32)
    for i, request in enumerate(requests):
        if request:
            ids, params, row = request
            uniforms[i] = sampling.uniforms(params.seed, row, len(ids), steps)
    return DecodeBatch(
        tokens=np.array([r[0][-1] if r else 0 for r in requests], np.int32),
        lengths=lengths,
        budgets=np.array(budgets or [steps if r else 0 for r in requests], np.int32),
        uniforms=uniforms,
        prompt_lengths=lengths + 1,
        params=tuple(r[1] if r else None for r in requests),
        stop_ids=stop_ids,
    )


def decode(requests, *, name="modern", **options):
    """Prefill all but the last id of each request into its row, then one dispatch."""
    decoder, params, _, _ = setup(name)
    cache = new_cache(name, len(requests))
    for row, request in enumerate(requests):
        if request and len(request[0]) > 1:
            cache, _ = decoder.prefill(params, cache, row, np.array(request[0][:-1]), 0)
    return decoder.decode(params, cache, batch_of(requests, **options))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_uncached_ones_however_the_text_is_cut(name):
    """Pieces longer and shorter than the short window of 128, each row at its own position."""
    decoder, params, _, logits = setup(name)
    cache, ends = new_cache(name), [0] * ROWS
    for row, length in [(1, 1), (0, 100), (1, 127), (2, 70), (0, 9), (1, 100), (2, 128), (0, 1)]:
        piece = TEXT[ends[row] : ends[row] + length]
        cache, last = decoder.prefill(params, cache, row, piece, ends[row])
        ends[row] += length
        assert_close(last, logits[ends[row] - 1])
    greedy = SamplingParams(temperature=0.0)
    follow = [(TEXT[: end + 1].tolist(), greedy, 0) for end in ends]
    result = decoder.decode(params, cache, batch_of(follow, budgets=[1] * ROWS))
    expected = jax.nn.log_softmax(logits[ends], axis=-1)
    assert_close(result.logprobs[:, 0], expected.max(axis=-1))
    assert result.tokens[:, 0].tolist() == expected.argmax(axis=-1).tolist()


@given(
    cuts=st.lists(st.integers(1, LENGTH - 1), max_size=6, unique=True), row=st.integers(0, ROWS - 1)
)
@settings(max_examples=15, deadline=None)
def test_any_cut_gives_the_same_logits(cuts, row):
    decoder, params, _, logits = setup()
    cache, begin = new_cache(), 0
    for end in [*sorted(cuts), LENGTH]:
        cache, last = decoder.prefill(params, cache, row, TEXT[begin:end], begin)
        assert_close(last, logits[end - 1])
        begin = end


@given(steps=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 56)), min_size=2, max_size=5))
@settings(max_examples=10, deadline=None)
def test_a_row_can_be_rewound_anywhere(steps):
    """Smearing needs the embedding before `start`, which a cache of one embedding has lost."""
    decoder, params, _, logits = setup()
    cache, last = decoder.prefill(params, new_cache(), 1, TEXT, 0)
    for start, length in steps:
        end = start + length
        garbage = np.full(8, 7, np.int32)
        cache, _ = decoder.prefill(params, cache, 1, garbage, start)
        cache, last = decoder.prefill(params, cache, 1, TEXT[start:end], start)
        assert_close(last, logits[end - 1])
        cache, _ = decoder.prefill(params, cache, 1, TEXT[end:], end)


def test_a_copied_row_continues_like_its_source_and_leaves_it_alone():
    decoder, params, _, logits = setup()
    cache, _ = decoder.prefill(params, new_cache(), 0, TEXT[:90], 0)
    cache = decoder.copy_row(cache, 0, 2, 50)
    cache, copied = decoder.prefill(params, cache, 2, TEXT[50:60], 50)
    cache, source = decoder.prefill(params, cache, 0, TEXT[90:95], 90)
    assert_close(copied, logits[59])
    assert_close(source, logits[94])


SAMPLED = SamplingParams(max_tokens=N, temperature=0.9, top_k=50, seed=3)
GREEDY = SamplingParams(max_tokens=N, temperature=0.0)
FILTERED = SamplingParams(max_tokens=N, temperature=1.3, top_p=0.9, min_p=0.01, seed=11)


@pytest.mark.parametrize("name", ["modern", "classic"])
def test_decoding_equals_generate_token_by_token(name):
    """Ragged rows, each with its own parameters; one crosses the end of the short window."""
    oracle = jitted(setup(name)[2])
    prompts = [TEXT[:1].tolist(), TEXT[:126].tolist(), TEXT[7:40].tolist()]
    requests = list(zip(prompts, (GREEDY, SAMPLED, FILTERED), (0, 5, 1), strict=True))
    result = decode(requests, name=name)
    for row, (ids, params, key) in enumerate(requests):
        expected = list(GPT.generate(oracle, ids, params, row=key))
        assert result.tokens[row].tolist() == expected
        text = jnp.asarray([[*ids, *expected[:-1]]])
        logprob = sampling.logprob(np.asarray(oracle(text))[0, -1], expected[-1])
        assert result.logprobs[row, -1] == pytest.approx(logprob, abs=1e-4)


def jitted(model):
    """The model as `generate` calls it, in one program: padding behind a text is not seen."""
    forward = jax.jit(lambda ids: model(ids))

    def logits(ids):
        padded = jnp.zeros((1, LENGTH), jnp.int32).at[:, : ids.shape[1]].set(ids)
        return forward(padded)[:, : ids.shape[1]]

    return logits


def test_rows_do_not_influence_each_other():
    request = (TEXT[:50].tolist(), SAMPLED, 4)
    alone = decode([None, request, None])
    others = decode([(TEXT[:120].tolist(), FILTERED, 0), request, (TEXT[:3].tolist(), GREEDY, 0)])
    np.testing.assert_array_equal(alone.tokens[1], others.tokens[1])
    np.testing.assert_array_equal(alone.logprobs[1], others.logprobs[1])


def test_rows_stop_at_their_budget_and_all_of_them_behind_the_first_stop_id():
    requests = [(TEXT[:20].tolist(), SAMPLED, key) for key in range(ROWS)]
    free = decode(requests).tokens
    stop = int(free[1, 2])
    assert stop not in [*free[1, :2], *free[0, :4], *free[2, :1]]
    result = decode(requests, budgets=[4, N, 1], stop_ids=frozenset({stop, 10**6}))
    assert result.counts.tolist() == [3, 3, 1]
    for row, count in enumerate(result.counts):
        np.testing.assert_array_equal(result.tokens[row, :count], free[row, :count])
    lengths = np.array([len(ids) - 1 for ids, _, _ in requests])
    np.testing.assert_array_equal(result.cache.lengths, lengths + result.counts)


def test_one_stop_in_eight_rows_ends_a_dispatch():
    requests = [(TEXT[:20].tolist(), SAMPLED, key) for key in range(17)]
    free = decode(requests).tokens
    stops = frozenset(free[:2, 1].tolist())
    behind = [next((i + 1 for i, t in enumerate(row) if t in stops), N) for row in free.tolist()]
    last = sorted(behind)[1]  # the second stop of 17 rows
    assert decode(requests, stop_ids=stops).counts.tolist() == [min(b, last) for b in behind]
    assert last < N


@pytest.fixture
def two_steps_per_look(monkeypatch):
    """As on a GPU; programs that were made before or are made now serve no other test."""
    monkeypatch.setattr(decoding, "STEPS_PER_LOOK", {"cpu": 4})  # of which 2 divide N
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_rows_go_on_until_the_next_look_and_those_that_have_stopped_do_not(two_steps_per_look):
    requests = [(TEXT[:20].tolist(), SAMPLED, key) for key in range(ROWS)]
    free = decode(requests).tokens
    stop = frozenset({int(free[1, 2])})
    result = decode(requests, budgets=[5, N, 1], stop_ids=stop)
    assert result.counts.tolist() == [4, 3, 1]
    for row, count in enumerate(result.counts):
        np.testing.assert_array_equal(result.tokens[row, :count], free[row, :count])
    lengths = np.array([len(ids) - 1 for ids, _, _ in requests])
    np.testing.assert_array_equal(result.cache.lengths, lengths + result.counts)


def test_idle_rows_keep_every_bit_even_a_full_one():
    decoder, params, _, _ = setup()
    cache, _ = decoder.prefill(params, new_cache(), 0, TEXT, 0)
    cache, _ = decoder.prefill(params, cache, 1, TEXT[:30], 0)
    before = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, cache))
    batch = batch_of([None, None, (TEXT[:1].tolist(), GREEDY, 0)])
    batch.lengths[:2] = LENGTH, 30
    after = decoder.decode(params, cache, batch).cache
    for old, new in zip((*before.keys, *before.values), (*after.keys, *after.values), strict=True):
        np.testing.assert_array_equal(old[:2], new[:2])
    np.testing.assert_array_equal(before.ids[:2], after.ids[:2])
    assert after.lengths.tolist() == [LENGTH, 30, N]


def test_a_row_can_be_filled_to_the_last_position():
    decoder, params, _, logits = setup()
    cache, _ = decoder.prefill(params, new_cache(), 0, TEXT[:-1], 0)
    batch = batch_of([(TEXT.tolist(), GREEDY, 0), None, None], budgets=[1, 0, 0])
    result = decoder.decode(params, cache, batch)
    assert result.tokens[0, 0] == logits[-1].argmax()


def test_what_does_not_fit_is_refused_with_numbers():
    decoder, params, _, _ = setup()
    with pytest.raises(ValueError, match="cannot put 57 tokens at position 200 of a row of 256"):
        decoder.prefill(params, new_cache(), 0, TEXT[:57], 200)
    with pytest.raises(ValueError, match="a row would hold 261 tokens"):
        decoder.decode(params, new_cache(), batch_of([(TEXT.tolist(), GREEDY, 0), None, None]))


def test_nothing_compiles_after_warm_up():
    """Neither other rows, lengths, budgets, stop ids nor sampling parameters need a new program."""
    config = replace(SMALL, n_layer=1)
    graphdef, params = split(make_perturbed(config))
    decoder = decoding.Decoder(graphdef, config)
    cache = kv_cache.make_cache(config, 2, LENGTH, jnp.dtype("float32"))
    programs = (
        decoder._read,
        decoder._write,
        decoder._decode,
        decoder._keep,
        decoder._copy_row,
    )

    def work(cache, row, length, sampling_params, stop_ids):
        cache, _ = decoder.prefill(params, cache, row, TEXT[:length], 0)
        requests = [None, None]
        requests[row] = (TEXT[: length + 1].tolist(), sampling_params, row)
        cache = decoder.decode(params, cache, batch_of(requests, stop_ids=stop_ids)).cache
        return decoder.copy_row(cache, row, 1 - row, length)

    cache = work(cache, 0, 20, GREEDY, NONE)
    compiled = [program._cache_size() for program in programs]
    for row, length, one in [(1, 33, SAMPLED), (0, 128, FILTERED), (1, 50, SamplingParams())]:
        cache = work(cache, row, length, one, frozenset({row, 5}))
    assert [program._cache_size() for program in programs] == compiled


def test_weights_are_converted_once_and_again_when_they_change():
    decoder, params, _, _ = setup()
    first = decoder.weights(params)
    assert decoder.weights(params) is first
    assert decoder.weights(dict(params)) is not first


def test_weights_that_need_no_conversion_are_not_kept_twice():
    """Of float32 ones on a CPU that would be as much memory again."""
    backend = JaxBackend(replace(SMALL, n_layer=1), device=0)
    backend.init(0)
    held = backend._decoder.weights(backend.params)
    assert held is backend.params
    half = JaxBackend(replace(SMALL, n_layer=1), device=0, dtype="bfloat16")
    half.init(0)
    converted = half._decoder.weights(half.params)
    assert {str(x.dtype) for x in converted.values()} == {"bfloat16"}


def test_decoding_in_bfloat16_keeps_the_cache_and_the_stream_in_it():
    model = make_perturbed(replace(SMALL, n_layer=1))
    model.dtype = jnp.dtype("bfloat16")
    graphdef, params = split(model)
    decoder = decoding.Decoder(graphdef, model.config)
    cache = kv_cache.make_cache(model.config, 1, LENGTH, model.dtype)
    cache, logits = decoder.prefill(params, cache, 0, TEXT[:20], 0)
    result = decoder.decode(params, cache, batch_of([(TEXT[:21].tolist(), SAMPLED, 0)]))
    assert logits.dtype == np.float32
    assert {x.dtype for x in result.cache.keys + result.cache.values} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in decoder.weights(params).values()} == {jnp.dtype("bfloat16")}
