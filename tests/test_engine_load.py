"""The engine on both backends: neighbours, failures, warm-up, log-probabilities, edges."""

import math
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
import torch

from jaxchat.engine import Engine
from jaxchat.jax_backend import JaxBackend
from jaxchat.request import Request
from jaxchat.sampling_params import MAX_TOP_K, MAX_TOP_LOGPROBS, SamplingParams
from tests.models import MODERN, shaken
from tests.test_engine import tokenizer
from torch_ref.torch_backend import TorchBackend

BACKENDS = ("jax", "torch")
CONTEXT = 64


@cache
def backend(name):
    """On one device."""
    return perturbed(name, "float32", context=256)


def perturbed(name, dtype, context):
    """Two layers with perturbed weights, the same for both backends."""
    config = replace(MODERN, n_layer=2, vocab_size=tokenizer().vocab_size, sequence_len=context)
    source = JaxBackend(config, device=0)
    source.init(0)
    made = {"jax": JaxBackend, "torch": TorchBackend}[name](config, dtype=dtype, device=0)
    made.set_params(shaken(source.get_params()))
    return made


def engine(name="jax", slots=16):
    return Engine(
        backend(name), tokenizer(), slots=slots, max_length=CONTEXT, tokens_per_dispatch=4
    )


def mixed_requests(count=16):
    """Every kind of sampling, prompts of 1 to 46 tokens."""
    rng = np.random.default_rng(1)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.6, "presence_penalty": 0.3},
        {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 0.0, "repetition_penalty": 1.5, "logit_bias": ((65, 3.0), (66, -100.0))},
    ]
    return [
        Request(
            rng.integers(0, 256, 1 + 3 * i).tolist(),
            SamplingParams(
                max_tokens=12, seed=i, ignore_eos=True, top_logprobs=i % 3, **kinds[i % len(kinds)]
            ),
            tools=False,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_request_gives_the_same_tokens_alone_and_beside_15_others(name):
    beside = engine(name).complete(mixed_requests())
    for i in (0, 2, 4, 8, 13, 15):
        (alone,) = engine(name).complete([mixed_requests()[i]])
        assert alone.ids == beside[i].ids
        np.testing.assert_allclose(alone.logprobs, beside[i].logprobs, atol=1e-5)


def eager_to_end(bias):
    return ((tokenizer().special_id("assistant_end"), bias),)


@pytest.fixture
def one_torch_thread():
    """With several, torch's attention in float32 depends on which of them has a row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_batch_invariant_engine_gives_the_same_bits(name, dtype):
    """Beside 15 others, some of which end in between, in another slot, and after and between other
    prompts."""
    one_backend = perturbed(name, dtype, context=512)  # two buckets of the cache
    rng = np.random.default_rng(1)
    requests = [
        Request(
            rng.integers(0, 256, 1 + 22 * i).tolist(),
            SamplingParams(
                temperature=i % 2, max_tokens=30 + i, seed=i, logit_bias=eager_to_end(i % 3)
            ),
            tools=False,
        )
        for i in range(16)
    ]

    def engine():
        return Engine(
            one_backend,
            tokenizer(),
            slots=16,
            max_length=447,  # so that a larger bucket is not merely a row of zeros more
            tokens_per_dispatch=8,
            batch_invariant=True,
        )

    one = engine()
    beside, turned = one.complete(requests), one.complete(requests[::-1])[::-1]
    one.complete([replace(request, ids=[*request.ids, *range(60)]) for request in requests])
    one.prefill_tokens = 1  # a prompt, a dispatch of what is under way, a prompt ...
    after = one.complete(requests)
    assert {reply.finish_reason for reply in beside} == {"stop", "length"}
    assert one.reused_tokens == 0
    for i in (0, 3, 7, 8, 12, 15):
        (alone,) = engine().complete([requests[i]])
        for reply in (beside[i], turned[i], after[i]):
            assert reply.ids == alone.ids
            assert reply.logprobs == alone.logprobs


def test_both_backends_give_the_same_tokens_and_alternatives():
    ours, theirs = (engine(name).complete(mixed_requests()) for name in BACKENDS)
    for one, other in zip(ours, theirs, strict=True):
        assert one.ids == other.ids
        for top, twin in zip(one.tops, other.tops, strict=True):
            assert [token for token, _ in top] == [token for token, _ in twin]
            np.testing.assert_allclose([x for _, x in top], [x for _, x in twin], atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_penalties_in_the_engine_are_those_of_the_slow_oracle(name):
    for request in (mixed_requests()[2], mixed_requests()[4]):
        (got,) = engine(name).complete([request])
        if name == "torch":
            model = backend(name).model
            assert got.ids == list(model.generate(list(request.ids), request.params))
        else:
            twin = engine("torch").complete([request])[0]
            assert got.ids == twin.ids


@pytest.mark.parametrize("name", BACKENDS)
def test_alternatives_are_ordered_and_hold_the_greedy_choice(name):
    params = SamplingParams(temperature=0.0, max_tokens=6, top_logprobs=3, ignore_eos=True)
    (got,) = engine(name).complete([Request([65, 66], params, tools=False)])
    assert [len(top) for top in got.tops] == [3] * 6
    for token, logprob, top in zip(got.ids, got.logprobs, got.tops, strict=True):
        assert top[0] == (token, pytest.approx(logprob, abs=1e-6))
        assert list(top) == sorted(top, key=lambda pair: -pair[1])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 61, CONTEXT])
def test_a_scored_prompt_agrees_with_evaluation(name, length):
    ids = np.random.default_rng(2).integers(0, 256, length).astype(np.int32)
    scores = engine(name, slots=1).score_prompt(ids.tolist())
    assert scores.top_ids.shape == (length, MAX_TOP_LOGPROBS)
    inputs, targets = ids[None, :-1], ids[None, 1:]
    if length > 1:
        nll, greedy = backend(name).score(inputs, targets)
        np.testing.assert_allclose(scores.logprobs[1:], -nll[0], atol=1e-5)
        np.testing.assert_array_equal(scores.top_ids[1:, 0], greedy[0])
    hit = scores.top_ids == ids[:, None]
    chosen = np.where(hit, scores.top_logprobs, 0).sum(axis=1)
    kept = hit.any(axis=1)
    np.testing.assert_array_equal(chosen[kept], scores.logprobs[kept])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("params", "length"),
    [
        (SamplingParams(top_k=0, max_tokens=3), 5),
        (SamplingParams(top_k=10**6, max_tokens=3), 5),
        (SamplingParams(top_k=MAX_TOP_K, max_tokens=3), 5),
        (SamplingParams(temperature=0.0, top_k=0, top_p=0.5, max_tokens=3), 5),
        (SamplingParams(max_tokens=3), 1),
        (SamplingParams(max_tokens=3), CONTEXT),
        (SamplingParams(max_tokens=1), 5),
        (SamplingParams(temperature=1e-6, min_p=1.0, top_p=1e-6, max_tokens=3), 5),
        (SamplingParams(temperature=1e-40, max_tokens=3), 5),
        (SamplingParams(top_p=1e-40, max_tokens=3), 5),
    ],
)
def test_edges(name, params, length):
    request = Request([65] * length, replace(params, ignore_eos=True), tools=False)
    (got,) = engine(name, slots=2).complete([request])
    assert len(got.ids) == min(params.max_tokens, CONTEXT + 1 - length)
    assert got.finish_reason == "length"
    if params.temperature < 1 or params.top_p < 1:
        greedy = replace(request, params=replace(request.params, temperature=0.0))
        assert got.ids == engine(name, slots=2).complete([greedy])[0].ids


def drive(one, failed):
    """Step until nothing is left, starting over after failures; tokens and ends by request."""
    tokens, ends = {}, {}

    def note(events):
        for event in events:
            if event.token is not None:
                tokens.setdefault(event.request, []).append(event.token)
            if event.finish_reason:
                ends[event.request] = event.finish_reason

    while one.busy:
        try:
            note(one.step())
        except ZeroDivisionError:
            failed.append(len(failed))
            assert len(failed) < 50
            note(one.reset())
            one.probe()
    return tokens, ends


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_that_fails_once_costs_nobody_anything(name, monkeypatch):
    requests = mixed_requests(4)
    expected = [engine(name, slots=2).complete([request])[0].ids for request in requests]
    one, failed = engine(name, slots=2), []
    decode, calls = one.backend.decode, []

    def fails_once(cache, batch):
        calls.append(1)
        return 1 / 0 if len(calls) == 2 else decode(cache, batch)

    monkeypatch.setattr(one.backend, "decode", fails_once)
    numbers = [one.submit(request) for request in requests]
    tokens, ends = drive(one, failed)
    assert len(failed) == 1
    assert [tokens[number] for number in numbers] == expected
    assert "error" not in ends.values()


@pytest.mark.parametrize(("limit", "wrong"), [(math.inf, 0), (1, 2)])
def test_only_the_request_that_makes_decoding_fail_ends(monkeypatch, limit, wrong):
    requests = mixed_requests(4)
    expected = [engine(slots=4).complete([request])[0].ids for request in requests]
    one, failed = engine(slots=4), []
    one.prefill_tokens = limit
    numbers = [one.submit(request) for request in requests]
    decode, guilty = one.backend.decode, requests[wrong].params

    def poisoned(cache, batch):
        return 1 / 0 if guilty in batch.params else decode(cache, batch)

    monkeypatch.setattr(one.backend, "decode", poisoned)
    tokens, ends = drive(one, failed)
    assert ends.pop(numbers[wrong]) == "error"
    assert "error" not in ends.values()
    assert len(failed) == 2  # together, and alone
    others = [i for i in range(4) if i != wrong]
    assert [tokens[numbers[i]] for i in others] == [expected[i] for i in others]


def test_an_engine_that_cannot_decode_at_all_ends_every_request(monkeypatch):
    one, failed = engine(slots=2), []
    numbers = [one.submit(request) for request in mixed_requests(4)]
    monkeypatch.setattr(one.backend, "decode", lambda cache, batch: 1 / 0)
    monkeypatch.setattr(one, "probe", lambda: None)
    assert drive(one, failed)[1] == dict.fromkeys(numbers, "error")


def test_nothing_compiles_after_warm_up():
    """Any mix of lengths, sampling, log-probabilities, samples, turns and scored prompts."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    one = engine(slots=5)
    one.warm_up()
    assert compiled
    assert not one.busy
    compiled.clear()
    one.complete([*mixed_requests(), replace(mixed_requests()[3], n=3)])
    for length in (1, 30, CONTEXT):
        one.score_prompt([65] * length)
    one.complete([Request([65] * 33, SamplingParams(max_tokens=40, top_p=0.5))])
    jax.monitoring.clear_event_listeners()
    assert compiled == []


def test_a_busy_engine_refuses_to_warm_up():
    one = engine(slots=1)
    one.submit(mixed_requests()[0])
    with pytest.raises(ValueError, match="busy"):
        one.warm_up()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=r"no .*device 99"):
        type(backend(name))(backend(name).config, device=99)


def test_a_replica_lives_on_the_device_it_is_given():
    second = JaxBackend(backend("jax").config, device=1)
    second.init(0)
    arrays = [*second.params.values(), *jax.tree.leaves(second.new_cache(2, CONTEXT))]
    assert {device for array in arrays for device in array.devices()} == {jax.devices()[1]}
