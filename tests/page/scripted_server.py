"""A server with the real page and a scripted engine, for what a real one does too rarely.

The page's routes are the product's own. The API answers what the test put into `script`, byte for
byte: streams cut anywhere, errors, broken connections, and replies that go on when the test says
so, for whoever looks at the middle of one must not race with its end. Replies that no test asked
for echo the message. It counts what is under way, as /metrics of the real server does, and keeps
every request for the test to look at.
"""

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxchat.server.page import page_routes
from tests.page.app_thread import DEADLINE_S, AppThread

Delta = tuple[str, str]
"""(part, text): `text`, `python` or `python_output`."""


@dataclass(frozen=True)
class Reply:
    """One scripted answer."""

    deltas: Sequence[Delta] = ()
    pause_s: float = 0.0
    """Between two deltas."""
    hold_after: int | None = None
    """Send so many deltas; each of the others, and the end, waits for `ScriptedServer.go_on`."""
    cut_at: int | None = None
    """Send the stream in two pieces, cut at this byte."""
    one_byte_at_a_time: bool = False
    break_after: int | None = None
    """Close the connection after so many deltas, without an end."""
    error_after: int | None = None
    """Report an error inside the stream after so many deltas."""
    status: int = 200
    error: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    tokens: Sequence[tuple[str, float | None, Sequence[tuple[str, float]]]] = ()
    """Log-probabilities, one entry a delta."""


def says(*texts: str, **options: Any) -> Reply:
    """A reply of plain text in these deltas."""
    return Reply([("text", text) for text in texts], **options)


def holds(*texts: str, **options: Any) -> Reply:
    """The same, without an end before the test says so."""
    return says(*texts, hold_after=len(texts), **options)


def fails(status: int, message: str, *, code: str | None = None, **headers: str) -> Reply:
    """A refusal with OpenAI's body."""
    error = {"message": message, "type": "error", "param": None, "code": code}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status=status, error=error, headers=named)


def event(document: Any) -> bytes:
    """One server-sent event; not ASCII, so that a cut can fall inside a character."""
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def chat_events(reply: Reply) -> Iterator[bytes]:
    """The events of a reply, as the real server writes them."""
    for index, (part, text) in enumerate(reply.deltas):
        if index == reply.break_after:
            return
        if index == reply.error_after:
            yield event({"error": {"message": "the engine failed", "type": "server_error"}})
            return
        tool = {"part": {"type": part, "text": text}}
        delta = {"content": text} if part == "text" else tool
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
        if reply.tokens:
            choice["logprobs"] = {"content": [_token(*reply.tokens[index])]}
        yield event({"object": "chat.completion.chunk", "choices": [choice]})
    if reply.break_after is not None and reply.break_after >= len(reply.deltas):
        return
    choice = {"index": 0, "delta": {}, "finish_reason": reply.finish}
    yield event({"object": "chat.completion.chunk", "choices": [choice]})
    count = len(reply.deltas)
    usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": 1 + count}
    yield event({"object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _token(text: str, logprob: float | None, top: Sequence[tuple[str, float]]) -> dict[str, Any]:
    others = [{"token": other, "logprob": value, "bytes": None} for other, value in top]
    return {"token": text, "logprob": logprob, "bytes": None, "top_logprobs": others}


class ScriptedServer(AppThread):
    """The page and what the test scripts."""

    def __init__(self) -> None:
        self.reset()
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/metrics", self._metrics),
            Route("/health", lambda request: JSONResponse({"status": "ok", "ready": True})),
            *page_routes(),
        ]
        super().__init__(Starlette(routes=routes))

    def reset(self) -> None:
        """Forget what other tests asked and scripted."""
        self.script: deque[Reply] = deque()
        self.models = ["d4-sft"]
        self.defaults: dict[str, float] = {"temperature": 0.6, "top_k": 50}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        """(path, body) of every request to the API."""
        self.running = 0
        self._may_send = 0

    def play(self, *replies: Reply) -> None:
        """What the next requests are answered with, in turn."""
        self.script.extend(replies)

    def go_on(self, count: int = 10**6) -> None:
        """Let so many deltas go that wait, or all of them."""
        self._may_send += count

    def wait_until_idle(self) -> None:
        """Until nothing streams."""
        deadline = time.monotonic() + DEADLINE_S
        while self.running:
            assert time.monotonic() < deadline, f"{self.running} replies still run"
            time.sleep(0.01)

    # --- the API ---------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        known = {"object": "model", "default_sampling_params": self.defaults}
        cards = [{"id": name, **known} for name in self.models]
        return JSONResponse({"object": "list", "data": cards})

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(f'jaxchat:num_requests_running{{model_name="x"}} {self.running}\n')

    async def _chat(self, request: Request) -> Response:
        return self._answer("/v1/chat/completions", await request.json())

    async def _complete(self, request: Request) -> Response:
        return self._answer("/v1/completions", await request.json())

    def _answer(self, path: str, body: dict[str, Any]) -> Response:
        self.requests.append((path, body))
        if self.script:
            reply = self.script.popleft()
        elif body["model"] not in self.models:
            message = f"The model {body['model']!r} does not exist"
            reply = fails(404, message, code="model_not_found")
        elif path == "/v1/completions":
            reply = says("… and so on, says ", body["model"])
        else:
            reply = says(f"{body['model']} heard: ", str(body["messages"][-1]["content"]))
        if reply.status != 200:
            return JSONResponse({"error": reply.error}, reply.status, reply.headers)
        return StreamingResponse(self._stream(path, reply), media_type="text/event-stream")

    async def _stream(self, path: str, reply: Reply) -> AsyncIterator[bytes]:
        self.running += 1
        try:
            async for piece in self._pieces(path, reply):
                yield piece
        finally:
            self.running -= 1

    async def _pieces(self, path: str, reply: Reply) -> AsyncIterator[bytes]:
        events = list(chat_events(reply) if path.endswith("chat/completions") else _texts(reply))
        if reply.cut_at is not None or reply.one_byte_at_a_time:
            whole = b"".join(events)
            at = range(1, len(whole)) if reply.one_byte_at_a_time else [reply.cut_at]
            for start, end in zip([0, *at], [*at, len(whole)], strict=True):
                yield whole[start:end]
                await asyncio.sleep(0.0 if reply.one_byte_at_a_time else 0.02)
            return
        for index, piece in enumerate(events):
            await self._hold(reply, index)
            yield piece
            if index < len(reply.deltas):
                await asyncio.sleep(reply.pause_s)
        if reply.break_after is not None:
            await self._hold(reply, len(events))
            raise ConnectionAbortedError("as scripted")

    async def _hold(self, reply: Reply, index: int) -> None:
        """Until the test lets the delta of this index go, or the end that follows the last one."""
        if reply.hold_after is None or not reply.hold_after <= index <= len(reply.deltas):
            return
        while self._may_send == 0:
            await asyncio.sleep(0.005)
        self._may_send -= 1


def _texts(reply: Reply) -> Iterator[bytes]:
    """The events of /v1/completions."""
    for _, text in reply.deltas:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
        yield event({"object": "text_completion", "choices": [choice]})
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": reply.finish}
    yield event({"object": "text_completion", "choices": [choice]})
    yield b"data: [DONE]\n\n"


if __name__ == "__main__":  # look at the page by hand: python -m tests.page.scripted_server
    with ScriptedServer() as server:
        print(server.url, flush=True)
        threading.Event().wait()
