"""What a client asks for is what the engine is given, field by field."""

import pytest

from jaxchat.config import GPTConfig
from jaxchat.conversation import render_for_completion
from jaxchat.engine import Engine
from jaxchat.sampling_params import SamplingParams
from tests.scripted import ScriptedBackend
from tests.servers import CONTEXT, make_engine, running, tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
PROMPT = render_for_completion(tokenizer(), {"messages": HELLO})

SAMPLERS = {
    "temperature": 0.3,
    "top_k": 7,
    "top_p": 0.8,
    "min_p": 0.05,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.2,
    "logit_bias": {"5": -1.0},
    "seed": 11,
    "stop": ["zz", "yy"],
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def server():
    with running([make_engine()], temperature=0.4, top_k=9, max_messages=3) as one:
        yield one


@pytest.fixture
def given(server, monkeypatch):
    """A function that posts a body and returns the request that reached the engine."""
    submit, seen = server.engine.submit, []
    monkeypatch.setattr(
        server.engine, "submit", lambda request: seen.append(request) or submit(request)
    )

    def post(path, **body):
        seen.clear()
        answer = server.post(path, body)
        assert answer.status_code == 200, answer.text
        (request,) = seen
        return request

    return post


@pytest.mark.parametrize(
    ("path", "asked"), [(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "hello"})]
)
def test_every_sampler_of_a_request_reaches_the_engine(given, path, asked):
    expected = {**SAMPLERS, "logit_bias": ((5, -1.0),), "stop": ("zz", "yy")}
    request = given(path, **asked, **SAMPLERS, max_tokens=3)
    assert request.params == SamplingParams(max_tokens=3, **expected)
    assert given(path, **asked, top_k=-1, max_tokens=1).params.top_k == 0


def test_a_chat_that_names_nothing_gets_the_servers_sampler_and_the_rest_of_the_context(given):
    request = given(CHAT, messages=HELLO)
    expected = SamplingParams(
        max_tokens=CONTEXT - len(PROMPT), temperature=0.4, top_k=9, seed=request.params.seed
    )
    assert (list(request.ids), request.params, request.tools) == (PROMPT, expected, True)


def test_a_plain_completion_samples_as_openais(given):
    request = given(COMPLETIONS, prompt="hello")
    ids = [tokenizer().bos_id, *tokenizer().encode("hello")]
    expected = SamplingParams(max_tokens=16, temperature=1.0, top_k=0, seed=request.params.seed)
    assert (list(request.ids), request.params, request.tools) == (ids, expected, False)


def test_the_newer_name_of_the_limit_wins(given):
    def limit(**fields):
        return given(CHAT, messages=HELLO, **fields).params.max_tokens

    assert limit(max_tokens=5) == 5
    assert limit(max_completion_tokens=6) == 6
    assert limit(max_tokens=5, max_completion_tokens=6) == 6


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("content", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_a_system_message_without_a_word_is_none(given, role, content):
    """Many a page sends its system prompt where nobody has written one."""
    empty = {"role": role, "content": content}
    assert list(given(CHAT, messages=[empty, *HELLO], max_tokens=1).ids) == PROMPT


def test_a_developer_is_the_system(given):
    ids = [
        list(
            given(CHAT, messages=[{"role": role, "content": "Be brief."}, *HELLO], max_tokens=1).ids
        )
        for role in ("system", "developer")
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) > len(PROMPT)


@pytest.mark.parametrize(
    ("path", "asked"), [(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "hello"})]
)
def test_the_token_that_ends_a_reply_is_counted(path, asked):
    """The model has written it, and whoever pays for tokens pays for it."""
    [a, b] = tokenizer().encode("a") + tokenizer().encode("b")
    text = [a, b, tokenizer().special_id("assistant_end")]

    def next_token(held):
        written = [id for id in held[-2:] if id in (a, b)]
        return text[len(written)]

    config = GPTConfig(sequence_len=CONTEXT, vocab_size=tokenizer().vocab_size)
    engine = Engine(Scripted(config, next_token), tokenizer(), slots=2)
    with running([engine]) as scripted:
        answer = scripted.post(path, {**asked, "max_tokens": 9}).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3


def test_offsets_of_a_reply_begin_behind_the_echo(server):
    asked = {"prompt": "señor, hello", "echo": True, "logprobs": 0, "max_tokens": 4}
    (choice,) = server.post(COMPLETIONS, {**asked, "temperature": 0}).json()["choices"]
    logprobs, ids = choice["logprobs"], tokenizer().encode("señor, hello")
    reply = logprobs["text_offset"][1 + len(ids) :]  # bos stands at 0, where the text begins
    assert logprobs["text_offset"][0] == 0
    assert len(reply) == 4
    assert reply[0] == len("señor, hello")
    assert reply == sorted(reply)


def test_log_probabilities_of_a_chat_are_those_of_its_text():
    """Not of what the model wrote to its calculator, nor of what that said."""
    (y,) = tokenizer().encode("y")
    marks = ("python_start", "python_end", "output_start", "output_end", "assistant_end")
    start, end, output, over, stop = (tokenizer().special_id(mark) for mark in marks)
    call = [start, *tokenizer().encode("1+1"), end, output, *tokenizer().encode("2"), over]
    text = [*PROMPT, y, *call, y, stop]
    config = GPTConfig(sequence_len=CONTEXT, vocab_size=tokenizer().vocab_size)
    engine = Engine(Scripted(config, lambda held: text[len(held)]), tokenizer(), slots=2)
    with running([engine]) as scripted:
        (choice,) = scripted.post(CHAT, {"messages": HELLO, "logprobs": True}).json()["choices"]
    assert [part["type"] for part in choice["message"]["parts"]] == [
        "text",
        "python",
        "python_output",
        "text",
    ]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["y", "y"]


class Scripted(ScriptedBackend):
    """Has nothing to warm up."""

    def warm_up(self, cache, steps):
        return cache


def test_more_messages_than_allowed_are_counted_in_the_error(server):
    long = HELLO + [{"role": "assistant", "content": "yes"}, *HELLO] * 2
    answer = server.post(CHAT, {"messages": long})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "5 messages, at most 3."
