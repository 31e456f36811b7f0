"""Clients that we did not write: openai, schemathesis, lm-eval, and many of them at once."""

import contextlib
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.asking import GREEDY, HELLO, LONG, chat, complete, in_slots, wait_for
from tests.servers import MODEL, SLOTS, running, tokenizer


@pytest.fixture(scope="module")
def server():
    with running(max_waiting=1000) as one:
        yield one


@pytest.fixture
def client(idle):
    with openai.OpenAI(base_url=idle.url + "/v1", api_key="none", max_retries=0) as one:
        yield one


ASK = {"model": MODEL, "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


# --- openai --------------------------------------------------------------------------------------


def test_openai_lists_and_retrieves_the_model(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "jaxchat"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


def test_openai_chats_whole_and_streamed(client):
    whole = client.chat.completions.create(messages=HELLO, n=2, **ASK)
    texts = [choice.message.content for choice in whole.choices]
    stream = client.chat.completions.create(
        messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}, **ASK
    )
    streamed, usage = ["", ""], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert usage == whole.usage


def test_openai_reads_log_probabilities_and_stops(client):
    options = {"logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(messages=HELLO, **options, **ASK)
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    assert all(one.token == one.top_logprobs[0].token for one in content)  # greedy
    text = answer.choices[0].message.content
    stopped = client.chat.completions.create(messages=HELLO, stop=text[3:5], **ASK)
    assert stopped.choices[0].message.content == text[: text.index(text[3:5])]
    assert stopped.choices[0].finish_reason == "stop"


def test_openai_completes_whole_streamed_and_echoed(client):
    whole = client.completions.create(prompt=["hello", "the dog"], n=2, **ASK)
    streamed = [""] * 4
    for chunk in client.completions.create(prompt=["hello", "the dog"], n=2, stream=True, **ASK):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in whole.choices]
    ids = [tokenizer().bos_id, *tokenizer().encode("hello")]
    echoed = client.completions.create(prompt=ids, echo=True, logprobs=2, **ASK)
    assert echoed.choices[0].text == "hello" + streamed[0]
    assert echoed.choices[0].logprobs.token_logprobs[0] is None


def test_openai_raises_its_own_errors(client):
    cases = [
        (openai.BadRequestError, {"messages": [{"role": "robot", "content": "x"}]}),
        (openai.BadRequestError, {"messages": HELLO, "max_tokens": 10**6}),
        (openai.NotFoundError, {"messages": HELLO, "model": "gpt-4"}),
    ]
    for kind, fields in cases:
        with pytest.raises(kind) as raised:
            client.chat.completions.create(**ASK | fields)
        assert raised.value.type.endswith("_error")
    assert raised.value.code == "model_not_found"
    long = {"role": "user", "content": "x" * 2_000_000}
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(messages=[long], model=MODEL)
    assert raised.value.status_code == 413


def test_openai_meets_keys_and_rates():
    with running(api_keys=("secret",), requests_per_minute=1) as one:

        def connect(key):
            return openai.OpenAI(base_url=one.url + "/v1", api_key=key, max_retries=0)

        with connect("wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with connect("secret") as right:
            right.models.list()
            with pytest.raises(openai.RateLimitError) as raised:
                right.models.list()
        assert int(raised.value.response.headers["retry-after"]) >= 1


def test_closing_a_stream_of_openai_frees_the_slot(client, idle, monkeypatch):
    step = idle.engine.step
    monkeypatch.setattr(idle.engine, "step", lambda: time.sleep(0.02) or step())
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, max_tokens=100, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    wait_for(lambda: in_slots(idle) == 1)
    stream.close()
    wait_for(lambda: in_slots(idle) == 0, seconds=2)
    assert idle.pool.workers[0].load == 0


# --- schemathesis --------------------------------------------------------------------------------


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


def call_with_generated_data(server, examples):
    """Every path of /openapi.json with valid and invalid data; returns the statuses it answered."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    statuses = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        answered = statuses.setdefault(operation.label, set())
        for mode in MODES:
            # nothing can be wrong with a path that takes nothing
            with contextlib.suppress(*[Unsatisfiable, ValueError] * (mode is MODES[1])):
                strategy = operation.as_strategy(generation_mode=mode)
                limits(given(case=strategy)(caller(answered)))()
    return statuses


def caller(answered):
    """Sends a case as it is and, where it has messages, once more with a sound conversation.

    Generated conversations hardly ever take turns, so nothing else of a request would be tried.
    """

    def send(case):
        response = case.call(timeout=60)
        answered.add(response.status_code)
        streamed = "event-stream" in str(response.headers.get("content-type"))
        checks = [one for one in CHECKS if not (streamed and one is response_schema_conformance)]
        case.validate_response(response, checks=checks)

    def call(case):
        send(case)
        if not isinstance(case.body, dict):
            return
        if case.path.endswith("/chat/completions"):
            case.body = {**case.body, **SOUND}
            send(case)
        elif case.path.endswith("tokenize"):  # a generated name is no model's
            case.body = {**case.body, "model": MODEL}
            send(case)

    return call


SOUND = {"messages": HELLO, "model": MODEL, "n": 2, "max_tokens": 3, "max_completion_tokens": None}


@pytest.mark.filterwarnings("ignore")  # schemathesis' own
def test_schemathesis_finds_no_server_error_and_no_undocumented_status(idle):
    statuses = call_with_generated_data(idle, examples=15)
    posts = {path: found for path, found in statuses.items() if path.startswith("POST")}
    assert (len(statuses), len(posts)) == (12, 5)
    for path, found in posts.items():
        assert found >= {200, 400}, path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_schemathesis_with_ten_times_the_data(idle):
    call_with_generated_data(idle, examples=150)


# --- many clients --------------------------------------------------------------------------------


def test_64_clients_of_which_half_leave_lose_nothing_and_leave_nothing(idle):
    """Bad requests mixed in; every surviving answer is the one of an idle server."""
    prompts = [f"text number {i % 8}: the lazy dog" for i in range(64)]
    body = {**GREEDY, "max_tokens": 24}
    alone = {prompt: complete(idle, prompt=prompt, **body).json()["choices"] for prompt in prompts}
    port = int(idle.url.rsplit(":", 1)[1])
    chance = random.Random(0)
    pauses = [chance.uniform(0, 0.3) for _ in prompts]

    def stay(number):
        if number % 8 == 1:
            assert complete(idle, prompt=[999999]).status_code == 400
            assert chat(idle, messages=[]).status_code == 400
        answer = complete(idle, prompt=prompts[number], **body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"] == alone[prompts[number]]

    def leave(number):
        content = json.dumps({"prompt": prompts[number], **LONG, "max_tokens": 60, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                f"{head}\r\nContent-Type: application/json\r\n\r\n{content}".encode()
            )
            time.sleep(pauses[number])
        return True

    with ThreadPoolExecutor(64) as threads:
        clients = [stay if number % 2 else leave for number in range(64)]
        futures = [threads.submit(one, number) for number, one in enumerate(clients)]
        assert all(future.result(timeout=60) for future in futures)
    idle.wait_idle()
    assert in_slots(idle) == 0
    assert not idle.engine.busy
    assert complete(idle, prompt=prompts[3], **body).json()["choices"] == alone[prompts[3]]


def test_many_prompts_in_one_request_take_turns_with_others(idle):
    with ThreadPoolExecutor() as threads:
        many = threads.submit(complete, idle, prompt=["the dog"] * 40)
        few = threads.submit(complete, idle, prompt="the dog")
        choices = many.result().json()["choices"]
        (one,) = few.result().json()["choices"]
    assert len(choices) == 40 > SLOTS
    assert {choice["text"] for choice in choices} == {one["text"]}


# --- lm-eval -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its dependencies' own
@pytest.mark.parametrize("remote", [False, True])
def test_lm_eval_reads_the_log_likelihoods_of_core_eval(idle, tmp_path, remote):
    """local-completions on a local task: the sums over continuations agree within 1e-4."""
    pytest.importorskip("lm_eval", reason="uv sync --group lm-eval installs it")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from jaxchat.core_eval import score_batch
    from jaxchat.core_tasks import Scored

    rows = [
        {"query": "The quick brown fox", "choices": [" jumps over", " sleeps"], "gold": 0},
        {"query": "12*3 =", "choices": [" 36", " 15", " 7"], "gold": 0},
        {"query": "Wie schön,", "choices": [" señor", " 你好"], "gold": 1},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"""task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    if remote:
        model = LocalCompletionsAPI(
            base_url=idle.url + "/v1/completions",
            model=MODEL,
            tokenizer_backend="remote",
            batch_size=2,
            max_length=128,
        )
    else:
        tokenizer().save(tmp_path / "tokenizer")
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer" / "tokenizer.json"),
            bos_token="<|bos|>",
            eos_token="<|assistant_end|>",
        )
        fast.save_pretrained(tmp_path / "tokenizer")
        model = LocalCompletionsAPI(
            base_url=idle.url + "/v1/completions",
            model=MODEL,
            tokenizer=str(tmp_path / "tokenizer"),
            batch_size=2,
            max_length=128,
        )
    results = simple_evaluate(
        model=model,
        tasks=["local_choices"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    compared = 0
    for sample in results["samples"]["local_choices"]:
        query = tokenizer().encode(sample["doc"]["query"])
        for choice, (logprob, greedy) in zip(
            sample["doc"]["choices"], sample["filtered_resps"], strict=True
        ):
            whole = tokenizer().encode(sample["doc"]["query"] + choice)
            scored = Scored(whole, len(query), len(whole))
            ((nats, hits),) = score_batch(idle.engine.backend, [scored], 8, 64)
            assert float(logprob) == pytest.approx(-nats * (len(whole) - len(query)), abs=1e-4)
            assert bool(greedy) == hits
            compared += 1
    assert compared == 7


def test_a_greedy_continuation_is_recognised_as_such(idle):
    """How lm-eval tells: a token is greedy when its log-probability equals the largest."""
    ids = [tokenizer().bos_id, *tokenizer().encode("hello")]
    grown = complete(idle, prompt=ids, logprobs=1).json()["choices"][0]["logprobs"]
    assert all(
        value == max(best.values())
        for value, best in zip(grown["token_logprobs"], grown["top_logprobs"], strict=True)
    )
    text = httpx.post(idle.url + "/tokenize", json={"prompt": "hello"}).json()
    assert text["tokens"] == ids
