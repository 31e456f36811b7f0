"""What the server refuses, with which words, and what it tells nobody."""

import logging

import httpx
import pytest

from jaxchat.server.errors import ApiError
from jaxchat.server.gate import RateLimit
from tests.server.asking import HELLO, chat, complete, error_of, fail_once, wait_for
from tests.servers import CONTEXT, MODEL, running


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 0 (user): content is empty"),
        ({"messages": [{"role": "system", "content": ""}]}, "at least one message"),
        ({"messages": [*HELLO, *HELLO]}, "take turns"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "nothing to answer"),
        ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, "parts"),
        (
            {
                "messages": [
                    {"role": "user", "content": "x", "parts": [{"type": "text", "text": "x"}]}
                ]
            },
            "a user message has no parts",
        ),
        (
            {
                "messages": [
                    *HELLO,
                    {
                        "role": "assistant",
                        "content": "x",
                        "parts": [{"type": "text", "text": "y"}],
                    },
                    *HELLO,
                ]
            },
            "differs from the text of its parts",
        ),
        ({"messages": "hello"}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": CONTEXT}, f"maximum context length is {CONTEXT} tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "the vocabulary ends at 300"),
        ({"logit_bias": {"7": 1, "07": 2}}, ""),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_chat_request_that_cannot_be_served_is_told_why(idle, fields, message):
    if fields == {"logit_bias": {"7": 1, "07": 2}}:
        assert chat(idle, **fields).status_code == 200  # one token, named twice: the last counts
        return
    error = error_of(chat(idle, **fields), 400)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "outside of the vocabulary"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 129}, "at most 128"),
        ({"prompt": ["x"] * 64, "n": 3}, "at most 128"),
        ({"prompt": "x" * 500}, "maximum context length"),
        ({"max_tokens": 0}, "without echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_completion_that_cannot_be_served_is_told_why(idle, fields, message):
    assert message in error_of(complete(idle, **fields), 400)["message"]


COMMON = [
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"guided_json": {"type": "object"}},
    {"guided_json": "{}"},
    {"guided_regex": "a*"},
    {"guided_choice": ["yes", "no"]},
    {"guided_grammar": "root ::= 'yes'"},
    {"tools": [{"type": "function"}]},
    {"stop_token_ids": [5]},
    {"include_stop_str_in_output": True},
    {"min_tokens": 5},
    {"bad_words": ["a"]},
    {"allowed_token_ids": [1]},
    {"prompt_logprobs": 0},
    {"truncate_prompt_tokens": 1},
    {"use_beam_search": True},
]
CHAT_ALONE = [
    {"modalities": ["text", "audio"]},
    {"audio": {"voice": "x", "format": "wav"}},
    {"web_search_options": {}},
    {"functions": [{"name": "f"}]},
    {"echo": True},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
]


@pytest.mark.parametrize(
    ("send", "fields"),
    [
        *((chat, fields) for fields in COMMON + CHAT_ALONE),
        *((complete, fields) for fields in [*COMMON, {"add_special_tokens": False}]),
    ],
)
def test_what_would_change_the_answer_and_cannot_be_done_is_refused(idle, send, fields):
    (name,) = fields
    assert error_of(send(idle, **fields), 400)["param"].split(".")[0] == name


def test_what_changes_no_answer_is_taken_as_clients_send_it(idle):
    nothing = {
        "response_format": {"type": "text"},
        **{name: {} for name in ("structured_outputs", "guided_json", "metadata")},
        **{name: [] for name in ("guided_choice", "tools", "stop_token_ids", "bad_words")},
        **dict.fromkeys(("guided_json", "guided_regex", "guided_grammar"), ""),
        **dict.fromkeys(("include_stop_str_in_output", "use_beam_search", "store"), False),
        "allowed_token_ids": [],
        "min_tokens": 0,
        "reasoning_effort": "low",
        "parallel_tool_calls": True,
    }
    alone = {
        chat: {"modalities": ["text"], "echo": False, "add_generation_prompt": True},
        complete: {"add_special_tokens": True, "best_of": 1},
    }
    for send, fields in alone.items():
        expected = send(idle).json()["choices"]
        assert send(idle, **nothing, **fields).json()["choices"] == expected
        null = dict.fromkeys([*nothing, *fields, "prompt_logprobs", "audio"])
        assert send(idle, **null).json()["choices"] == expected
    assert complete(idle, prompt=[5, 6], add_special_tokens=False).status_code == 200


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
LEAVE_OUT = "not supported: leave it out"


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages.0.content.0.type",
            "messages.0.content.0.type: Input should be 'text', 'python' or 'python_output'; "
            "messages.0.content.0.text: Field required",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "messages.0.content.0.text: Field required",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "stop": ""},
            "stop",
            "stop: String should have at least 1 character",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "stop": 5},
            "stop",
            "stop: Input should be a valid string; stop: Input should be a valid list",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "logit_bias": {"x": 1}},
            "logit_bias.x",
            "logit_bias.x: String should match pattern '^[0-9]{1,9}$'",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "tools": [{"type": "function"}]},
            "tools",
            f"tools: {LEAVE_OUT}",
        ),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix", f"suffix: {LEAVE_OUT}"),
        (
            "completions",
            {"prompt": []},
            "prompt",
            "prompt: List should have at least 1 item after validation, not 0",
        ),
        (
            "completions",
            {"prompt": [[1, -1]]},
            "prompt.0.1",
            "prompt.0.1: Input should be greater than or equal to 0",
        ),
        (
            "completions",
            {"prompt": 5, "n": 0},
            "n",
            "prompt: Input should be a valid string; prompt: Input should be a valid list; "
            "n: Input should be greater than or equal to 1",
        ),
    ],
)
def test_a_fault_is_named_as_the_body_has_it(idle, path, fields, param, message):
    """Not with the names of pydantic's types, and of several types by the nearest alone."""
    error = error_of(idle.post(f"/v1/{path}", fields), 400)
    told = "; ".join(sorted(error["message"].split("; ")))
    assert (error["param"], told) == (param, "; ".join(sorted(message.split("; "))))


def test_a_body_that_is_no_json_is_called_so(idle):
    headers = {"Content-Type": "application/json"}
    url = idle.url + "/v1/completions"
    error = error_of(httpx.post(url, content=b'{"prompt": "x"', headers=headers), 400)
    assert (error["param"], error["message"]) == (None, "the body is not JSON (at 14)")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"messages": NaN}', b"[" * 10_000, b'"\xff"', b"null"]
)
def test_bodies_that_are_no_request_are_refused(idle, body):
    answer = httpx.post(
        idle.url + "/v1/chat/completions",
        content=body,
        headers={"Content-Type": "application/json"},
    )
    error_of(answer, 400)


def test_numbers_that_json_has_not_are_refused(idle):
    content = b'{"prompt": "x", "temperature": NaN}'
    headers = {"Content-Type": "application/json"}
    error_of(httpx.post(idle.url + "/v1/completions", content=content, headers=headers), 400)


def test_biases_end_at_their_first_error(idle):
    """All of them would be looked at before their number: 1.4 s, with nobody else served."""
    bad = dict.fromkeys(("x", "y", "z"), "heavy")
    fault = "logit_bias.x: String should match pattern '^[0-9]{1,9}$'"
    assert error_of(chat(idle, logit_bias=bad), 400)["message"] == fault


def test_a_bias_beyond_the_vocabulary_is_the_bias_at_fault(idle):
    for send in (chat, complete):
        error = error_of(send(idle, logit_bias={"300": 1}), 400)
        assert error["param"] == "logit_bias"


def test_half_a_surrogate_pair_does_no_harm(idle):
    headers = {"Content-Type": "application/json"}
    for content in (b'{"prompt": "\\ud800"}', b'{"prompt": "x", "model": "\\ud800"}'):
        answer = httpx.post(idle.url + "/v1/completions", content=content, headers=headers)
        assert answer.status_code in (200, 400, 404)


def test_other_paths_methods_and_models_are_refused(idle):
    assert error_of(idle.get("/v2/models"), 404)["type"] == "not_found_error"
    answer = idle.get("/v1/completions")
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"
    assert error_of(chat(idle, model="gpt-4"), 404)["code"] == "model_not_found"
    assert error_of(idle.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"
    for end in ("", "/"):
        assert idle.get(f"/v1/models/{MODEL}{end}").json()["max_model_len"] == CONTEXT


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_long_is_refused_declared_or_not(idle, declared):
    body = b'{"prompt": "' + b"x" * 1_100_000 + b'"}'
    content = body if declared else iter([body[:600_000], body[600_000:]])
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(idle.url + "/v1/completions", content=content, headers=headers)
    assert "1,048,576 bytes" in error_of(answer, 413)["message"]


def test_every_answer_has_the_security_headers_and_none_opens_the_door(idle):
    answers = [
        chat(idle),
        chat(idle, stream=True),
        chat(idle, n=0),
        idle.get("/nope"),
        idle.get("/", headers={"Host": "evil.example"}),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert error_of(answers[-1], 403)["type"] == "permission_error"
    page = idle.get("/").headers
    for name in ("content-security-policy", "cache-control"):
        assert len(page.get_list(name)) == 1  # the page has its own
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(idle.url + "/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in answer.headers
    form = httpx.post(
        idle.url + "/v1/completions",
        content=b'{"prompt": "x"}',
        headers={"Content-Type": "text/plain"},
    )
    error_of(form, 400)  # what a page of another site may send without asking


def test_no_word_of_a_prompt_is_logged(idle, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG, logger="jaxchat")
    caplog.set_level(logging.DEBUG, logger="uvicorn")
    secret = [{"role": "user", "content": "xylophone"}]
    chat(idle, messages=secret)
    chat(idle, messages=secret, n=0)
    chat(idle, messages=[*secret, *secret])
    monkeypatch.setattr(idle.engine.backend, "decode", fail_once(idle.engine.backend.decode))
    chat(idle, messages=secret)
    assert "POST /v1/chat/completions 200" in caplog.text
    assert "RuntimeError: out of memory" in caplog.text
    assert "xylophone" not in caplog.text


def test_nothing_long_that_a_client_sends_is_logged(idle, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="jaxchat")
    with idle.connect(b"A" * 60_000 + b" /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        assert b" 405 " in client.recv(1 << 16)
    wait_for(lambda: "(other) /health 405" in caplog.text)
    monkeypatch.setitem(idle.app.state.services, "x" * 9000, None)  # a bug of ours
    assert idle.get("/v1/models/" + "x" * 9000).status_code == 500
    assert "GET '/v1/models/xxx" in caplog.text
    assert all(len(message) < 200 for message in caplog.messages)


def test_keys_rates_and_origins():
    settings = {
        "api_keys": ("first", "second"),
        "requests_per_minute": 3,
        "allowed_origins": ("https://page.example",),
        "allowed_hosts": ("127.0.0.1", "My.Example"),
    }
    with running(**settings) as one:
        assert one.get("/health", headers={"Host": "mY.example:80"}).status_code == 200
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
            answer = one.get("/v1/models", headers=headers)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert [one.get(path).status_code for path in ("/", "/health", "/ready")] == [200] * 3
        first = {"Authorization": "Bearer first"}
        assert [one.get("/v1/models", headers=first).status_code for _ in range(3)] == [200] * 3
        answer = one.get("/v1/models", headers=first)
        assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["retry-after"]) <= 21
        second = {"Authorization": "Bearer second", "Origin": "https://page.example"}
        answer = one.get("/v1/models", headers=second)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        exposed = answer.headers["access-control-expose-headers"]
        assert exposed == "Retry-After, X-Should-Retry"  # which openai's client looks for
        asked = {
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        }
        url = one.url + "/v1/chat/completions"
        assert httpx.options(url, headers=asked).status_code == 200
        asked["Origin"] = "https://other.example"
        assert httpx.options(url, headers=asked).status_code == 400


def test_probes_name_the_server_as_they_like_and_may_ask_for_the_head():
    with running(allowed_hosts=("my.example",)) as one:
        for path in ("/health", "/ready"):
            for method in ("GET", "HEAD"):
                answer = httpx.request(method, one.url + path, headers={"Host": "10.1.2.3:8000"})
                assert answer.status_code == 200
                assert bool(answer.content) == (method == "GET")
        for path in ("/", "/metrics", "/v1/models"):
            error_of(one.get(path, headers={"Host": "10.1.2.3:8000"}), 403)


def test_a_key_may_have_letters_beyond_ascii():
    """curl sends the bytes of UTF-8, a browser those of Latin-1."""
    keys = ("ascii", "schlüssel-à", "ключ")
    with running(api_keys=keys) as one:

        def status(key):
            headers = {"Authorization": b"Bearer " + key}
            return one.get("/v1/models", headers=headers).status_code

        sent = [key.encode() for key in keys] + [b"schl\xfcssel-\xe0"]
        assert [status(key) for key in sent] == [200] * 4
        assert status(b"schlussel") == status("schlüssel".encode()) == 401


def test_without_a_key_only_what_tells_nothing_is_answered():
    with running(api_keys=("first",), allowed_hosts=()) as one:
        assert one.get("/", headers={"Host": "any.example"}).status_code == 200
        paths = one.get("/openapi.json").json()["paths"]
        told = {
            path
            for path, methods in paths.items()
            for method in methods
            if httpx.request(method, one.url + path, json={}).status_code != 401
        }
        assert told <= {"/health", "/ready"}
        assert {"/metrics", "/stats", "/v1/models", "/v1/completions"} <= paths.keys()
        second = {"Authorization": "Bearer firs"}
        assert one.get("/metrics", headers=second).status_code == 401


def test_a_rate_limit_fills_at_an_even_pace():
    now = [0.0]
    limit = RateLimit(60, clock=lambda: now[0])
    for _ in range(60):
        limit.spend(0)
    with pytest.raises(ApiError) as refused:
        limit.spend(0)
    assert refused.value.retry_after_s == 1
    limit.spend(1)
    now[0] = 1.0
    limit.spend(0)
    with pytest.raises(ApiError):
        limit.spend(0)
    now[0] = 3600.0  # an hour of silence saves no more than a minute's
    for _ in range(60):
        limit.spend(0)
    with pytest.raises(ApiError):
        limit.spend(0)
