"""Clients that leave, queues that are full, engines that fail."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxchat.server import sse, worker
from tests.server.asking import (
    HELLO,
    LONG,
    POISON,
    chat,
    complete,
    error_of,
    events,
    fail_once,
    in_slots,
    wait_for,
)
from tests.servers import MODEL, SLOTS, make_engine, running


def ended(server):
    """How many requests and replies have ended for each reason."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {
        sample.labels["finished_reason"]: sample.value
        for sample in samples
        if sample.name == "jaxchat:request_success_total"
    }


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots_within_one_dispatch(slow, stream):
    aborted = ended(slow).get("abort", 0)
    body = json.dumps({"messages": HELLO, **LONG, "n": 3, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(slow.url.rsplit(":", 1)[1]))) as client:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        )
        client.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        wait_for(lambda: in_slots(slow) == 3)
    steps = []
    step = slow.engine.step
    slow.engine.step = lambda: steps.append(in_slots(slow)) or step()
    wait_for(lambda: in_slots(slow) == 0)
    slow.engine.step = step
    assert len(steps) <= 2  # the one under way when the connection closed, and the one after
    assert slow.pool.workers[0].load == 0
    assert ended(slow)["abort"] == aborted + 1


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_client_that_leaves_is_counted_as_such_and_not_as_a_bad_request(slow, share):
    def counted(status):
        families = text_string_to_metric_families(slow.get("/metrics").text)
        labels = {"path": "/v1/chat/completions", "status": status}
        samples = [sample for family in families for sample in family.samples]
        return sum(
            one.value
            for one in samples
            if one.name == "jaxchat:http_requests_total" and one.labels == labels
        )

    before = {status: counted(status) for status in ("400", "499", "500")}
    body = json.dumps({"messages": HELLO, **LONG}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    head += "\r\nContent-Type: application/json\r\n\r\n"
    with slow.connect(head.encode() + body[: int(share * len(body))]):
        if share == 1.0:
            wait_for(lambda: in_slots(slow) == 1)
        else:
            time.sleep(0.2)
    wait_for(lambda: counted("499") == before["499"] + 1)
    assert [counted(status) for status in ("400", "500")] == [before["400"], before["500"]]


def test_a_full_queue_sends_requests_away_and_takes_them_again():
    with ThreadPoolExecutor() as threads, running(max_waiting=2) as one:
        step = one.engine.step
        one.engine.step = lambda: time.sleep(0.02) or step()
        first = [threads.submit(chat, one, n=n, **LONG) for n in (SLOTS, 2)]
        wait_for(lambda: one.pool.workers[0].load == SLOTS + 2)
        answer = chat(one)
        assert error_of(answer, 503)["type"] == "overloaded_error"
        assert int(answer.headers["retry-after"]) >= 1
        assert [future.result().status_code for future in first] == [200, 200]
        assert chat(one).status_code == 200


@pytest.mark.parametrize(("send", "stream"), [(chat, True), (complete, False)])
def test_a_burst_cannot_overfill_the_queue(monkeypatch, send, stream):
    engine = make_engine()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.01) or step())
    with ThreadPoolExecutor(12) as threads, running([engine], max_waiting=2) as one:
        sent = [threads.submit(send, one, **LONG, n=SLOTS, stream=stream) for _ in range(12)]
        statuses = [future.result().status_code for future in sent]
        assert (statuses.count(200), statuses.count(503)) == (1, 11)
        error_of(send(one, n=SLOTS + 3), 400)  # would never fit
        error_of(send(one, n=2, temperature=9), 400)
        assert send(one, n=SLOTS + 2, max_tokens=1).status_code == 200  # every place is free again
        assert one.pool.reserved == 0


def test_a_prompt_that_is_scored_takes_one_place_and_not_two(monkeypatch):
    go, engine = threading.Event(), make_engine()
    score = engine.score_prompt
    monkeypatch.setattr(engine, "score_prompt", lambda ids: go.wait(30) and score(ids))
    with running([engine], max_waiting=2) as one, ThreadPoolExecutor() as threads:
        scored = threads.submit(complete, one, prompt=["a"] * SLOTS, echo=True, logprobs=1)
        wait_for(lambda: one.pool.workers[0].load == SLOTS)
        beside = threads.submit(chat, one, n=2)
        wait_for(lambda: one.pool.workers[0].load == SLOTS + 2)
        error_of(chat(one), 503)  # now it is full
        go.set()
        assert [future.result().status_code for future in (scored, beside)] == [200, 200]
        one.wait_idle()
        assert one.pool.reserved == 0


def test_a_request_that_takes_too_long_is_ended(monkeypatch):
    with running(timeout_s=0.3) as one:
        step = one.engine.step
        one.engine.step = lambda: time.sleep(0.1) or step()
        answer = chat(one, **LONG)
        assert "longer than 0.3 s" in error_of(answer, 503)["message"]
        assert "retry-after" not in answer.headers
        assert answer.headers["x-should-retry"] == "false"  # once more would take as long
        stream = chat(one, **LONG, stream=True)
        assert stream.status_code == 200
        last = stream.text.strip().split("\n\n")[-1]
        assert "longer than 0.3 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
        one.wait_idle()
        assert ended(one) == {"timeout": 2}


def test_a_prompt_and_its_reply_have_one_limit_of_time_together(monkeypatch):
    with running(timeout_s=1.0) as one:
        score, step = one.engine.score_prompt, one.engine.step
        monkeypatch.setattr(one.engine, "score_prompt", lambda ids: time.sleep(0.7) or score(ids))
        monkeypatch.setattr(one.engine, "step", lambda: time.sleep(0.1) or step())
        answer = complete(one, echo=True, logprobs=1, max_tokens=24, ignore_eos=True)
        assert "longer than 1 s" in error_of(answer, 503)["message"]


def test_equal_prompts_without_a_seed_differ(idle):
    prompts = [[5, 6, 7]] * 4
    texts = [
        choice["text"] for choice in complete(idle, prompt=prompts, temperature=1).json()["choices"]
    ]
    assert len(set(texts)) > 1
    texts = [
        c["text"] for c in complete(idle, prompt=prompts, temperature=1, seed=3).json()["choices"]
    ]
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{}] * 250_000}),
        ("/v1/completions", {"prompt": [{}] * 250_000}),
        ("/v1/completions", {"prompt": [[""]] * 150_000}),
        ("/v1/completions", {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(70_000)))}),
        ("/detokenize", {"tokens": [""] * 250_000}),
    ],
)
def test_a_body_full_of_errors_holds_nobody_up(idle, path, body):
    with ThreadPoolExecutor() as threads:
        sent = threads.submit(idle.post, path, body)
        longest = 0.0
        while not sent.done():
            started = time.monotonic()
            assert idle.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - started)
        assert "error" in error_of(sent.result(), 400)["type"]
    assert longest < 2


@pytest.mark.parametrize(
    ("send", "fields"),
    [(chat, {}), (complete, {}), (complete, {"prompt": ["hello"] * 3, "echo": True})],
)
def test_a_client_that_reads_slowly_is_told_that_its_time_is_over(monkeypatch, send, fields):
    """Be the reply written by then or not: it was kept for completions, whatever that took."""
    write = sse._write

    async def slowly(*arguments, **options):
        await asyncio.sleep(0.5)
        await write(*arguments, **options)

    monkeypatch.setattr(sse, "_write", slowly)
    with running(timeout_s=1.0) as one:
        step = one.engine.step
        for pause_s in (0.05, 0):
            one.engine.step = lambda pause_s=pause_s: time.sleep(pause_s) or step()
            last = send(one, **LONG, **fields, stream=True).text.strip().split("\n\n")[-1]
            assert "longer than 1 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
            one.wait_idle()
            wait_for(lambda: one.pool.reserved == 0)


def test_a_prompt_that_fails_ends_its_siblings_in_the_stream(idle, monkeypatch):
    score = idle.engine.score_prompt
    monkeypatch.setattr(
        idle.engine, "score_prompt", lambda ids: 1 / 0 if len(ids) == 2 else score(ids)
    )
    prompts = [[5, 6], [5, 6, 7], [5, 6, 7, 8]]
    stream = complete(idle, prompt=prompts, echo=True, logprobs=1, stream=True, **LONG)
    last = json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    idle.wait_idle()
    wait_for(lambda: idle.pool.reserved == 0)


def test_a_failed_step_answers_500_and_the_next_request_is_served(idle, monkeypatch):
    expected = chat(idle).json()["choices"]
    monkeypatch.setattr(idle.engine.backend, "decode", fail_once(idle.engine.backend.decode))
    error = error_of(chat(idle), 500)
    assert error["type"] == "server_error"
    assert "out of memory" not in error["message"]
    assert chat(idle).json()["choices"] == expected
    assert idle.get("/ready").status_code == 200


def test_several_models_stand_beside_each_other():
    with running(others={"other": [make_engine()]}) as one:
        cards = one.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == [MODEL, "other"]
        assert one.get("/v1/models/other").json()["id"] == "other"
        defaults = {"temperature": 0.6, "top_k": 50}
        assert [card["default_sampling_params"] for card in cards] == [defaults, defaults]
        answers = [chat(one, model=name).json() for name in (MODEL, "other", None)]
        assert [answer["model"] for answer in answers] == [MODEL, "other", MODEL]
        assert answers[0]["choices"] == answers[1]["choices"]  # the same weights
        assert complete(one, model="other").json()["model"] == "other"
        assert "'tiny', 'other'" in error_of(chat(one, model="third"), 404)["message"]
        families = text_string_to_metric_families(one.get("/metrics").text)
        prompts = next(family for family in families if family.name == "jaxchat:prompt_tokens")
        counts = {sample.labels["model_name"]: sample.value for sample in prompts.samples}
        assert counts[MODEL] > counts["other"] > 0
        assert one.get("/stats").json()["total_workers"] == 2
        one.app.state.services["other"].pool.draining = True
        assert one.get("/ready").status_code == 503
        assert one.get("/health").json()["ready"] is False
        one.wait_idle()


def test_a_bug_of_ours_answers_500_with_the_headers_of_every_answer(idle, monkeypatch):
    monkeypatch.setattr(idle.service, "reserve", lambda replies: 1 / 0)
    answer = chat(idle)
    assert "log says more" in error_of(answer, 500)["message"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_failed_score_answers_500(idle, monkeypatch):
    monkeypatch.setattr(idle.engine.backend, "score_prompt", lambda ids: 1 / 0)
    error_of(complete(idle, echo=True, logprobs=1), 500)
    assert complete(idle).status_code == 200


def test_a_prompt_that_cannot_be_read_takes_nobody_down_however_often(slow, monkeypatch):
    """Its neighbours' rows are lost with the cache and read again; their replies do not notice."""
    expected = [chat(slow, **LONG).json()["choices"], chat(slow, **LONG, seed=5, n=2).json()]
    prefill = slow.engine.backend.prefill

    def poisoned(cache, row, ids, start):
        if POISON in ids:
            prefill(cache, row, ids, start)  # takes the cache along
            raise RuntimeError("poison")
        return prefill(cache, row, ids, start)

    monkeypatch.setattr(slow.engine.backend, "prefill", poisoned)
    with ThreadPoolExecutor() as threads:
        neighbours = [
            threads.submit(chat, slow, **LONG),
            threads.submit(chat, slow, **LONG, seed=5, n=2, stream=True),
        ]
        wait_for(lambda: in_slots(slow) == 3)
        for stream in (False, True, False, False, False):
            answer = complete(slow, prompt=[1, POISON], n=5, stream=stream)
            assert "Generation failed" in answer.text
        assert neighbours[0].result().json()["choices"] == expected[0]
        chunks = [c for chunk in events(neighbours[1].result()) for c in chunk["choices"]]
    for choice in expected[1]["choices"]:
        own = [chunk["delta"] for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(d.get("content", "") for d in own) == choice["message"]["content"]
    assert slow.get("/ready").status_code == 200


def test_an_engine_that_stays_broken_is_given_up(monkeypatch):
    monkeypatch.setattr(worker, "PAUSE_S", 0.01)
    with running() as one:
        monkeypatch.setattr(one.engine.backend, "prefill", lambda *_: 1 / 0)
        assert [chat(one).status_code for _ in range(2)] == [500, 503]
        answer = one.get("/ready")
        assert "must be started again" in error_of(answer, 503)["message"]
        assert "retry-after" in answer.headers
        assert one.get("/health").status_code == 200


def test_an_engine_that_is_broken_for_a_moment_goes_on(monkeypatch):
    monkeypatch.setattr(worker, "PAUSE_S", 0.01)
    with running() as one:
        backend = one.engine.backend
        new_cache, failures = backend.new_cache, [1, 2]

        def short_of_memory(rows, max_length):
            return new_cache(rows, max_length) if not failures else failures.pop() / 0

        monkeypatch.setattr(backend, "new_cache", short_of_memory)
        monkeypatch.setattr(backend, "decode", fail_once(backend.decode))
        error_of(chat(one), 500)
        assert chat(one).status_code == 200
        assert ended(one) == {"error": 1, "length": 1}


def test_a_failure_is_told_where_to_start_over_takes_two_attempts(monkeypatch):
    """The second one has nothing to tell of what the first one ended."""
    monkeypatch.setattr(worker, "PAUSE_S", 0.01)
    with running() as one:
        prefill, failures = one.engine.backend.prefill, ["a request", "a probe"]

        def fails_twice(*given):
            if failures:
                raise RuntimeError(failures.pop())
            return prefill(*given)

        monkeypatch.setattr(one.engine.backend, "prefill", fails_twice)
        error_of(chat(one), 500)
        assert not failures
        assert chat(one).status_code == 200


def test_readiness_waits_for_warm_up(monkeypatch):
    engine, go = make_engine(), threading.Event()
    warm_up = engine.warm_up
    monkeypatch.setattr(engine, "warm_up", lambda: go.wait(30) and warm_up())
    with running([engine], ready=False) as one:
        for answer in (one.get("/ready"), chat(one)):
            error = error_of(answer, 503)
            assert "is starting" in error["message"] and error["code"] == "starting"
            assert 1 <= int(answer.headers["retry-after"]) <= 10
        assert one.get("/health").json() == {"status": "ok", "ready": False}
        go.set()
        wait_for(lambda: one.get("/ready").status_code == 200)
        assert chat(one).status_code == 200


def test_a_failed_warm_up_is_never_ready(monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine, "warm_up", lambda: 1 / 0)
    with running([engine], ready=False) as one:
        wait_for(lambda: one.pool.workers[0].failed)
        assert error_of(one.get("/ready"), 503)["code"] is None  # waiting would not help


def test_replicas_share_the_work_and_give_the_same_answers():
    engines = [make_engine() for _ in range(2)]
    with running(engines) as one, ThreadPoolExecutor(2 * SLOTS) as threads:
        wait_for(lambda: all(worker.available for worker in one.pool.workers))
        for engine in engines:
            step = engine.step
            engine.step = lambda step=step: time.sleep(0.02) or step()
        futures = [threads.submit(chat, one, **LONG) for _ in range(2 * SLOTS)]
        wait_for(lambda: [worker.load for worker in one.pool.workers] == [SLOTS, SLOTS])
        texts = {f.result().json()["choices"][0]["message"]["content"] for f in futures}
        assert len(texts) == 1
        assert one.get("/stats").json()["total_workers"] == 2
