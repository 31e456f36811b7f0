"""The engine: scheduling with a real model, awkward replies with a scripted backend."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat import sampling
from jaxchat.config import GPTConfig
from jaxchat.engine import Completion, Engine, Request
from jaxchat.jax_backend import JaxBackend
from jaxchat.reply import StopFilter
from jaxchat.sampling_params import SamplingParams
from jaxchat.tokenizer import Tokenizer
from tests.models import MODERN, shaken
from tests.scripted import ScriptedBackend

GREEDY = SamplingParams(temperature=0.0, max_tokens=100)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "She sells sea shells on the sea shore; the shells she sells are sea shells.",
    "Wie schön, señor: ünïcödé 你好, 12*3 = 36 and 7+8 = 15.",
] * 4


@cache
def tokenizer():
    return Tokenizer.train(SENTENCES, vocab_size=300)


def special(name):
    return tokenizer().special_id(name)


def prompt(text="hello"):
    return [special("bos"), *tokenizer().encode(text)]


# --- with a scripted backend ---------------------------------------------------------------------


def script(*pieces):
    """Ids of a reply: strings are encoded, `<name>` is a special token."""
    ids = []
    for piece in pieces:
        is_special = piece[0] == "<" and piece[-1] == ">"
        ids += [special(piece[1:-1])] if is_special else tokenizer().encode(piece)
    return ids


def saying(reply, *, start=None, **options):
    """An engine whose model says `reply` after the prompt `start`, a tool's output included."""
    start = prompt() if start is None else start
    text = [*start, *reply]

    def next_token(held):
        assert list(held) == text[: len(held)], "the row holds other ids than the script"
        return text[len(held)] if len(held) < len(text) else special("assistant_end")

    config = GPTConfig(sequence_len=512, vocab_size=tokenizer().vocab_size)
    return Engine(ScriptedBackend(config, next_token), tokenizer(), **options)


def reply_to(reply, *, params=GREEDY, dispatch=4, **request):
    """The completion of a scripted reply, with its events checked against each other."""
    engine = saying(reply, slots=2, tokens_per_dispatch=dispatch)
    events = list(engine.generate(Request(prompt(), params, **request)))
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [
        True
    ]
    completion = Completion(events[0].request, 0)
    for event in events:
        completion.add(event)
    assert not engine.busy
    return completion


@pytest.mark.parametrize("dispatch", [1, 3, 100])
def test_a_reply_ends_at_assistant_end_which_is_not_part_of_it(dispatch):
    reply = reply_to(script("The lazy dog.", "<assistant_end>"), dispatch=dispatch)
    assert reply.text == "The lazy dog."
    assert tokenizer().decode(reply.ids) == "The lazy dog."
    assert (reply.finish_reason, reply.stop_id) == ("stop", special("assistant_end"))
    assert reply.stop_logprob is not None


def test_bos_in_the_middle_of_a_reply_ends_it():
    """karpathy/nanochat issue 549: the model samples bos and a new document follows."""
    reply = reply_to(script("done", "<bos>", "a new document"))
    assert (reply.text, reply.finish_reason, reply.stop_id) == ("done", "stop", special("bos"))


def test_eos_can_be_ignored():
    reply = reply_to(
        script("a", "<bos>", "b", "<assistant_end>", "cdefgh"),
        params=replace(GREEDY, max_tokens=7, ignore_eos=True),
    )
    assert len(reply.ids) == 7
    assert reply.text.startswith("abc")


@pytest.mark.parametrize("dispatch", [1, 100])
def test_a_tool_call_is_answered_and_the_model_reads_the_answer(dispatch):
    reply = script("12*3 is ", "<python_start>", "12*3", "<python_end>")
    output = script("<output_start>", "36", "<output_end>")
    rest = script("so 36.", "<assistant_end>")
    got = reply_to([*reply, *output, *rest], dispatch=dispatch)
    assert got.parts == [
        {"type": "text", "text": "12*3 is "},
        {"type": "python", "text": "12*3"},
        {"type": "python_output", "text": "36"},
        {"type": "text", "text": "so 36."},
    ]
    assert got.text == "12*3 is so 36."
    assert got.ids == [*reply, *output, *rest[:-1]]
    expected = [True] * len(reply) + [False] * len(output) + [True] * (len(rest) - 1)
    assert got.sampled == expected


@pytest.mark.parametrize("call", ["1/0", "import os", "(", "2+"])
def test_a_call_that_the_calculator_refuses_gets_no_output(call):
    reply = script("<python_start>", call, "<python_end>", "sorry", "<assistant_end>")
    got = reply_to(reply)
    assert all(got.sampled)
    assert got.text == "sorry"


@pytest.mark.parametrize(
    "pieces",
    [
        ("<python_end>", "fine", "<assistant_end>"),
        ("<python_start>", "<python_end>", "fine", "<assistant_end>"),
        ("<output_end>", "<user_start>", "fine", "<assistant_end>"),
    ],
)
def test_stray_special_tokens_have_no_text_and_call_nothing(pieces):
    got = reply_to(script(*pieces))
    assert got.text == "fine"
    assert all(got.sampled)


def test_a_second_python_start_begins_the_call_again():
    call = script("<python_start>", "9+", "<python_start>", "1+1", "<python_end>")
    got = reply_to([*call, *script("<output_start>", "2", "<output_end>", "<assistant_end>")])
    assert got.parts[-1] == {"type": "python_output", "text": "2"}


def test_tools_can_be_refused():
    got = reply_to(script("<python_start>", "1+1", "<python_end>", "2"), tools=False)
    assert all(got.sampled)


def test_forced_tokens_count_and_never_go_beyond_the_limit():
    call = script("<python_start>", "11*11", "<python_end>")
    output = script("<output_start>", "121", "<output_end>")
    for extra in range(len(output) + 1):
        limit = len(call) + extra
        got = reply_to([*call, *output], params=replace(GREEDY, max_tokens=limit))
        assert (len(got.ids), got.finish_reason) == (limit, "length")


@pytest.mark.parametrize("dispatch", [1, 2, 100])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("lazy",), "The quick "),
        (("zy d",), "The quick la"),
        (("dog", "lazy"), "The quick "),
        (("The",), ""),
        (("absent",), "The quick lazy dog"),
        (("dogma", "dog!"), "The quick lazy dog"),
    ],
)
def test_stop_strings_span_tokens_and_never_leak(stop, expected, dispatch):
    ids = [*(tokenizer().encode("The quick lazy dog")), special("assistant_end")]
    engine = saying(ids, tokens_per_dispatch=dispatch)
    events = list(engine.generate(Request(prompt(), replace(GREEDY, stop=stop))))
    shown = ""
    for event in events:
        shown += event.text
        assert expected.startswith(shown)
    assert (shown, events[-1].finish_reason) == (expected, "stop")


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_a_stop_filter_ends_before_the_first_complete_stop_however_cut(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    one = StopFilter(stops)
    shown = [one.push(text[a:b]) for a, b in pairwise([0, *cuts, len(text)])]
    shown.append(one.flush())
    complete = (n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops))
    end = next(complete, None)
    assert one.matched == (end is not None)
    longest = max((len(s) for s in stops if end is not None and text[:end].endswith(s)), default=0)
    assert "".join(shown) == text[:end][: (end or len(text)) - longest]


def test_half_a_character_is_never_shown():
    ids = [*"你好ü".encode(), special("assistant_end")]  # the first 256 ids are the bytes
    engine = saying(ids, tokens_per_dispatch=1)
    texts = [event.text for event in engine.generate(Request(prompt(), GREEDY))]
    assert "".join(texts) == "你好ü"
    assert not any("\ufffd" in text for text in texts)


def test_an_unfinished_character_at_the_end_is_marked():
    got = reply_to([*"好".encode()[:2], special("assistant_end")])
    assert got.text == "\ufffd"


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_max_tokens_is_exact(limit):
    got = reply_to([65] * 50, params=replace(GREEDY, max_tokens=limit))
    assert (len(got.ids), got.finish_reason) == (limit, "length")


@pytest.mark.parametrize("length", [1, 7, 8])
def test_a_reply_ends_where_the_context_does(length):
    """Also after a prompt that fills it: the last token needs no room, it is never read."""
    start = [65] * length
    engine = saying([66] * 50, start=start, max_length=8, tokens_per_dispatch=4)
    (got,) = engine.complete([Request(start, GREEDY)])
    assert (len(got.ids), got.finish_reason) == (9 - length, "length")


def test_impossible_prompts_are_refused_with_numbers():
    engine = saying([], max_length=8)
    for ids, message in [
        ([65] * 9, "has 9 tokens, this engine reads 1 to 8"),
        ([], "has 0 tokens"),
        ([10**6], "outside of the vocabulary of 300"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(Request(ids))
    with pytest.raises(ValueError, match="max_length=513 between 1 and the model's context of 512"):
        saying([], max_length=513)
    assert not engine.busy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"row": -1}, "row=-1 at least 0"),
        ({"params": replace(GREEDY, logit_bias=((300, 1.0),))}, "names token 300, .* ends at 300"),
    ],
)
def test_a_request_that_cannot_be_served_takes_none_of_its_list_down(fields, message):
    """Where the first ones had begun, the engine was busy with them for ever."""
    engine = saying([65] * 3)
    good = Request(prompt(), GREEDY)
    with pytest.raises(ValueError, match=message):
        engine.complete([good, replace(good, **fields)])
    assert [len(reply.ids) for reply in engine.complete([good])] == [3]


def test_progress_is_the_share_of_replies_that_are_whole():
    engine, heard = saying([65] * 9, slots=1, tokens_per_dispatch=4), []
    engine.complete([Request(prompt(), GREEDY, n=2)], heard.append)
    assert heard == [0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1]  # a prompt and three dispatches for each


def test_samples_of_one_prompt_share_one_prefill():
    engine = saying([65] * 3, slots=3)
    completions = engine.complete([Request(prompt(), GREEDY, n=7)])
    assert [len(one.ids) for one in completions] == [3] * 7
    assert engine.backend.prefills == [(0, 0, len(prompt()))]


def test_a_conversation_is_read_from_where_it_was_left():
    first = prompt("2+2?")
    reply = script("it is four", "<assistant_end>")
    second = [*first, *reply, *tokenizer().encode(" and 3+3?")]

    def next_token(held):
        for text in ([*first, *reply], [*second, *reply]):
            if list(held) == text[: len(held)] and len(held) < len(text):
                return text[len(held)]
        return special("bos")

    config = GPTConfig(sequence_len=512, vocab_size=300)
    backend = ScriptedBackend(config, next_token)
    engine = Engine(backend, tokenizer(), slots=2, tokens_per_dispatch=4)
    (answer,) = engine.complete([Request(first, GREEDY)])
    engine.complete([Request(second, GREEDY)])
    row, start, _ = backend.prefills[1]
    assert (row, start) == (backend.prefills[0][0], len(first) + len(answer.ids))
    engine.complete([Request(first, GREEDY)])  # rewinds: only the last id is read again
    assert backend.prefills[2][1:] == (len(first) - 1, 1)


def test_a_new_request_joins_between_two_dispatches_and_a_finished_one_frees_its_slot():
    engine = saying([65] * 60, slots=2, tokens_per_dispatch=4)
    params = replace(GREEDY, max_tokens=10)
    a, b, c = (engine.submit(Request(prompt(), params)) for _ in range(3))
    seen = []
    while engine.busy:
        seen += [(event.request, event.finish_reason) for event in engine.step()]
    finished = [number for number, reason in seen if reason]
    assert finished == [a, b, c]
    assert max(engine.backend.dispatches) == 2
    assert len(engine.backend.prefills) == 3


def test_a_cancelled_request_ends_at_once_and_frees_its_slot():
    engine = saying([65] * 60, slots=1, tokens_per_dispatch=2)
    running = engine.submit(Request(prompt(), GREEDY))
    waiting = engine.submit(Request(prompt(), GREEDY))
    last = engine.submit(Request(prompt(), replace(GREEDY, max_tokens=3)))
    events = engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    engine.cancel(12345)
    while engine.busy:
        events += engine.step()
    reasons = {event.request: event.finish_reason for event in events if event.finish_reason}
    assert reasons == {running: "cancelled", waiting: "cancelled", last: "length"}


def test_closing_a_stream_cancels_it():
    engine = saying([65] * 60, tokens_per_dispatch=2)
    stream = engine.generate(Request(prompt(), GREEDY))
    next(stream)
    assert engine.busy
    stream.close()
    assert not engine.busy


def test_generate_and_complete_want_the_engine_for_themselves():
    engine = saying([65] * 60)
    engine.submit(Request(prompt(), GREEDY))
    with pytest.raises(ValueError, match="use submit and step"):
        engine.complete([Request(prompt(), GREEDY)])


# --- with a real model ---------------------------------------------------------------------------


@cache
def backend():
    """Two layers, grouped queries, a short window; perturbed, so that every weight matters."""
    config = replace(MODERN, n_layer=2, vocab_size=tokenizer().vocab_size)
    backend = JaxBackend(config)
    backend.init(0)
    backend.set_params(shaken(backend.get_params()))
    return backend


def real_engine(slots=4):
    return Engine(backend(), tokenizer(), slots=slots, max_length=64, tokens_per_dispatch=4)


SAMPLED = SamplingParams(temperature=1.0, top_k=50, max_tokens=9, seed=7)


def requests(count):
    rng = np.random.default_rng(1)
    return [
        Request(
            rng.integers(0, 256, 1 + 5 * i).tolist(),
            replace(SAMPLED, seed=i, temperature=0.5 * (i % 3), ignore_eos=True),
        )
        for i in range(count)
    ]


def test_a_request_gives_the_same_tokens_alone_and_among_others():
    among = real_engine().complete(requests(8))
    for i in (0, 3, 7):
        (alone,) = real_engine().complete([requests(8)[i]])
        assert alone.ids == among[i].ids
        np.testing.assert_allclose(alone.logprobs, among[i].logprobs, atol=1e-5)


def test_samples_of_one_prompt_differ_from_their_first_token_on():
    """karpathy/nanochat pull request 201: all n samples shared the first token."""
    hot = replace(SAMPLED, temperature=3.0, top_k=None, max_tokens=4)
    together = real_engine().complete([Request(prompt(), hot, n=8)])
    assert len({one.ids[0] for one in together if one.ids}) > 3
    for row in (0, 5):
        (alone,) = real_engine().complete([Request(prompt(), hot, row=row)])
        assert alone.ids == together[row].ids


@pytest.mark.parametrize("row", [0, 3])
def test_the_engine_says_what_the_model_says(row):
    request = replace(requests(5)[4], params=replace(SAMPLED, max_tokens=3), row=row)
    (got,) = real_engine().complete([request])
    ids = list(request.ids)
    for token, logprob in zip(got.ids, got.logprobs, strict=True):
        uniform = sampling.uniform(SAMPLED.seed, row, len(ids))
        logits = next_logits(ids)
        assert token == sampling.sample(logits, SAMPLED, uniform)
        assert logprob == pytest.approx(sampling.logprob(logits, token), abs=1e-4)
        ids.append(token)


def test_penalties_count_the_whole_reply_and_not_the_prompt_where_they_should():
    """Over several dispatches, which know of a row only what they are told."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=11,
        presence_penalty=1.5,
        frequency_penalty=1.0,
        repetition_penalty=1.3,
        logit_bias=((65, 8.0), (66, 8.0)),
        ignore_eos=True,
    )
    request = Request(requests(5)[4].ids, params, tools=False)
    (got,) = real_engine().complete([request])
    ids, length = list(request.ids), len(request.ids)
    for token in got.ids:
        history = sampling.History(ids[:length], ids[length:])
        row = np.pad(np.array([ids], np.int32), ((0, 0), (0, 64 - len(ids))))
        logits = backend().logits(row, np.array([len(ids) - 1], np.int32))[0]
        assert token == sampling.sample(logits, params, np.float32(0), history)
        ids.append(token)
    assert got.ids.count(66) > 1 and len(set(got.ids)) > 3  # the bias, and what tempers it


def test_a_stop_string_within_a_calculation_stops_nothing():
    call = script("<python_start>", "1+1", "<python_end>")
    output = script("<output_start>", "2", "<output_end>")
    said = [*call, *output, *script("so 1+1 is")]
    reply = reply_to(said, params=replace(GREEDY, stop=("1+1",)))
    assert [(part["type"], part["text"]) for part in reply.parts] == [
        ("python", "1+1"),
        ("python_output", "2"),
        ("text", "so "),
    ]


def next_logits(ids):
    """Logits after a text, from the cache-free half of the backend: one score per token."""
    vocab = backend().config.vocab_size
    inputs = np.zeros((vocab // 8 * 8 + 8, 64), np.int32)
    inputs[:, : len(ids)] = ids
    targets = np.full(inputs.shape, -1, np.int32)
    targets[:vocab, len(ids) - 1] = np.arange(vocab)
    return -backend().score(inputs, targets).nll[:vocab, len(ids) - 1]


def test_turns_of_a_conversation_give_what_a_fresh_engine_gives():
    """The second turn rewinds into the first and continues it: smearing must not notice."""
    engine = real_engine(slots=1)
    first = requests(6)[5]
    (reply,) = engine.complete([first])
    for cut in (len(first.ids) - 3, len(first.ids), len(first.ids) + len(reply.ids)):
        ids = [*[*first.ids, *reply.ids][:cut], 33, 44, 55]
        request = Request(ids, replace(SAMPLED, ignore_eos=True))
        assert engine.complete([request])[0].ids == real_engine(1).complete([request])[0].ids


def test_nothing_compiles_after_the_first_request():
    """Not even for the cache that the first step returns: it is where a new one is."""
    real_engine().complete(requests(8)[2:3])
    decoder = backend()._decoder
    programs = (decoder._read, decoder._write, decoder._decode, decoder._keep)
    before = [program._cache_size() for program in programs]
    real_engine().complete(requests(8)[1:3])
    assert [program._cache_size() for program in programs] == before


def test_penalties_still_count_after_a_call_of_the_calculator():
    """There the host samples, not the device."""
    (a, b) = (tokenizer().encode(letter)[0] for letter in "ab")
    call = ["<python_start>", "1+1", "<python_end>", "<output_start>", "2", "<output_end>"]
    text = [*prompt(), a, *script(*call), a]

    class Undecided(ScriptedBackend):
        """Would rather say what is in the script than `b`, by less than the penalty."""

        def _logits(self, held):
            logits = np.zeros(self.config.vocab_size, np.float32)
            logits[[self.next_token(held), b]] = 2.0, 1.0
            return logits

    config = GPTConfig(sequence_len=512, vocab_size=tokenizer().vocab_size)
    backend = Undecided(config, lambda held: text[len(held)])
    engine = Engine(backend, tokenizer(), tokens_per_dispatch=4)
    params = replace(GREEDY, presence_penalty=1.5, max_tokens=len(text) - len(prompt()))
    (reply,) = engine.complete([Request(prompt(), params)])
    assert (reply.ids[0], reply.ids[-1]) == (a, b)


def test_numbers_that_are_not_finite_end_their_request_and_say_so():
    """The model of a damaged file, or one too large for its dtype, is not sampled from."""

    class Damaged(ScriptedBackend):
        def _logits(self, held):
            return np.full_like(super()._logits(held), np.nan)

    config = GPTConfig(sequence_len=64, vocab_size=tokenizer().vocab_size)
    engine = Engine(Damaged(config, lambda held: 65), tokenizer(), slots=1)
    number = engine.submit(Request([1, 2], GREEDY))
    with pytest.raises(ValueError, match=r"logits are not finite.*JAXCHAT_DTYPE=float32"):
        engine.step()
    assert [(event.request, event.finish_reason) for event in engine.reset()] == [(number, "error")]


def test_a_dispatch_of_what_is_not_finite_takes_its_request_down_alone():
    """Log-probabilities of a row that a device has spoilt, beside those of one that is sound."""

    class Spoilt(ScriptedBackend):
        def decode(self, cache, batch):
            result = super().decode(cache, batch)
            result.logprobs[[held[0] == 2 for held in cache]] = np.nan
            return result

    config = GPTConfig(sequence_len=64, vocab_size=tokenizer().vocab_size)
    engine = Engine(Spoilt(config, lambda held: 65), tokenizer(), slots=2)
    params, ends = replace(GREEDY, max_tokens=9), {}
    sound, spoilt = (engine.submit(Request([first, 5], params)) for first in (1, 2))
    while engine.busy:
        try:
            events = engine.step()
        except ValueError:
            events = engine.reset()
        ends |= {event.request: event.finish_reason for event in events if event.finish_reason}
    assert ends == {sound: "length", spoilt: "error"}


def test_the_token_that_ends_a_reply_has_the_models_probability():
    """Also where the host samples it, right behind the prompt."""
    end = tokenizer().special_id("assistant_end")
    for request in requests(8):
        params = replace(request.params, ignore_eos=False, logit_bias=((end, 100.0),))
        (reply,) = real_engine().complete([replace(request, params=params)])
        assert (reply.ids, reply.stop_id) == ([], end)
        scores = real_engine().score_prompt([*request.ids, reply.stop_id])
        assert reply.stop_logprob == pytest.approx(scores.logprobs[-1], abs=1e-4)
        assert reply.stop_logprob < 0


def test_the_first_token_does_not_wait_for_a_dispatch():
    engine = saying([65] * 20, tokens_per_dispatch=8)
    engine.submit(Request(prompt(), GREEDY))
    assert [event.token for event in engine.step()] == [65]
    assert engine.backend.dispatches == []
