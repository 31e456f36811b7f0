"""Large answers: what they may hold, and that they hold nobody up."""

import asyncio
import json

import pytest

from jaxchat.server import errors, logprobs, sse
from tests.server.asking import chat, complete, error_of, events
from tests.servers import running, tokenizer


def in_event_loop():
    return asyncio._get_running_loop() is not None


@pytest.fixture
def log_of_prompt(monkeypatch):
    """Whether the event loop made the log of a prompt, for each time that one was made."""
    add, made = logprobs.CompletionLog.add_prompt, []

    def spied(*arguments):
        made.append(in_event_loop())
        add(*arguments)

    monkeypatch.setattr(logprobs.CompletionLog, "add_prompt", spied)
    return made


@pytest.fixture
def dumped(monkeypatch):
    """(whether in the event loop, choices) for every document with choices put into words."""
    dumps, seen = json.dumps, []

    def spied(content, **options):
        choices = len(content.get("choices", [])) + ("finish_reason" in content)
        if choices:
            seen.append((in_event_loop(), choices))
        return dumps(content, **options)

    monkeypatch.setattr(errors.json, "dumps", spied)
    return seen


ECHO = {"prompt": ["the lazy dog", "hello"], "n": 4, "echo": True, "logprobs": 2}


@pytest.mark.parametrize("wanted", [0, 3])
def test_the_log_of_a_prompt_is_made_once_and_beside_the_event_loop(idle, log_of_prompt, wanted):
    """For each of 128 replies anew it kept everybody waiting, 3 s for a prompt of 128 tokens."""
    choices = complete(idle, **ECHO, max_tokens=wanted).json()["choices"]
    assert log_of_prompt == [False, False]
    for choice in choices:
        text = ECHO["prompt"][choice["index"] // 4]
        ids = [tokenizer().bos_id, *tokenizer().encode(text)]
        assert {len(values) for values in choice["logprobs"].values()} == {len(ids) + wanted}
    assert choices[0]["logprobs"] == choices[3]["logprobs"]


def test_a_whole_answer_is_put_into_words_beside_the_event_loop_choice_by_choice(idle, dumped):
    """All threads wait for one call of json, in whichever it is."""
    answers = [complete(idle, **ECHO), chat(idle, n=3, logprobs=True, top_logprobs=2)]
    assert dumped == [(False, 1)] * (8 + 3)
    for answer in answers:
        assert answer.headers["content-type"] == "application/json"
        assert answer.text == json.dumps(answer.json())
        assert list(answer.json())[-2:] == ["choices", "usage"]


def test_every_echo_of_a_stream_leaves_on_its_own(idle, monkeypatch):
    write, written = sse._write, []

    async def spied(send, body, **options):
        written.append(body.count(b"text_completion"))
        await write(send, body, **options)

    monkeypatch.setattr(sse, "_write", spied)
    answer = complete(idle, **ECHO, max_tokens=0, stream=True)
    assert written == [1] * 8 + [0, 0]
    whole = complete(idle, **ECHO, max_tokens=0).json()["choices"]
    streamed = [chunk["choices"][0] for chunk in events(answer)]
    assert sorted(streamed, key=lambda choice: choice["index"]) == whole


@pytest.mark.parametrize("stream", [False, True])
def test_more_log_probabilities_than_an_answer_may_have_are_counted_in_the_error(stream):
    prompt = [5] * 10
    with running(max_logprobs=240) as one:

        def asked(send, **fields):
            answer = send(one, **fields, stream=stream)
            return answer if answer.status_code == 200 else error_of(answer, 400)["message"]

        most = {"prompt": [prompt] * 2, "n": 2, "echo": True, "max_tokens": 10, "logprobs": 2}
        assert asked(complete, **most).status_code == 200
        told = "Up to 84 tokens in all replies x 3 log-probabilities are 252, at most 240."
        assert told in asked(complete, **{**most, "max_tokens": 11})
        assert "x 4 log-probabilities are 320" in asked(complete, **{**most, "logprobs": 3})
        assert asked(complete, **{**most, "max_tokens": 40, "echo": False}).startswith("Up to 160")
        assert asked(complete, **{**most, "max_tokens": 99, "logprobs": None}).status_code == 200
        talk = {"n": 4, "max_tokens": 20, "logprobs": True, "top_logprobs": 2}
        assert asked(chat, **talk).status_code == 200
        assert "84 tokens" in asked(chat, **{**talk, "max_tokens": 21})
        assert "at most 240" in asked(chat, **{**talk, "max_tokens": None})
        assert (
            asked(chat, **{**talk, "logprobs": False, "top_logprobs": 0, "n": 9}).status_code == 200
        )
