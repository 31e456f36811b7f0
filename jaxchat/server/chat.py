"""`/v1/chat/completions`: messages in, the next message out, whole or as a stream."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from jaxchat.conversation import render_for_completion
from jaxchat.request import Completion, Event
from jaxchat.request import Request as EngineRequest
from jaxchat.server import responses
from jaxchat.server.errors import ApiError, documented
from jaxchat.server.logprobs import TokenLog, chat_entry
from jaxchat.server.pool import Place
from jaxchat.server.requests import ChatRequest, Message, Part
from jaxchat.server.service import (
    Service,
    new_id,
    random_seed,
    service_of,
    usage,
    while_connected,
    whole_answer,
)
from jaxchat.server.sse import EventStream
from jaxchat.tokenizer import Tokenizer

router = APIRouter()

STREAMED = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "The reply; with `stream` as server-sent events that end with `[DONE]`.",
    }
}
GENERATION_ERRORS = documented(400, 401, 404, 408, 413, 429, 503)


@router.post(
    "/v1/chat/completions",
    response_model=responses.ChatCompletion,
    responses={**STREAMED, **GENERATION_ERRORS},
    operation_id="chat",
)
@router.post(
    "/chat/completions",
    response_model=responses.ChatCompletion,
    responses={**STREAMED, **GENERATION_ERRORS},
    operation_id="chat_alias",
)
async def chat(body: ChatRequest, request: Request) -> Response:
    """The next message of a conversation."""
    service = service_of(request, body.model)
    with contextlib.ExitStack() as until_done:
        place = until_done.enter_context(contextlib.closing(service.reserve(body.n or 1)))
        engine_request = await run_in_threadpool(_engine_request, service, body)
        reply = _Reply(service, body, engine_request, place)
        if body.stream:
            return EventStream(reply.stream(), until_done.pop_all())
        return await while_connected(request, reply.whole())


def _engine_request(service: Service, body: ChatRequest) -> EngineRequest:
    """Everything about the request that can be wrong is found here."""
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
    ids = conversation_ids(service, body.messages)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = service.sampling(
        body,
        max_tokens=service.room(len(ids), most, param="messages"),
        seed=random_seed(),
        temperature=service.settings.temperature,
        top_k=service.settings.top_k,
        top_logprobs=body.top_logprobs or 0,
    )
    n = body.n or 1
    service.check_logprobs(n * params.max_tokens, params.top_logprobs if body.logprobs else None)
    engine_request = EngineRequest(ids, params, n=n)
    service.check(engine_request, param="messages")
    return engine_request


def conversation_ids(service: Service, messages: Sequence[Message]) -> list[int]:
    """The prompt that a conversation makes. ApiError 400 names the message that is wrong."""
    if len(messages) > service.settings.max_messages:
        most = service.settings.max_messages
        raise ApiError(400, f"{len(messages)} messages, at most {most}.", param="messages")
    if messages[-1].role == "assistant":
        raise ApiError(
            400,
            "The last message is the assistant's: there is nothing to answer.",
            param="messages",
        )
    try:
        told = [_as_message(message) for message in messages]
        conversation = {"messages": [message for message in told if message is not None]}
        return render_for_completion(service.tokenizer, conversation)
    except ValueError as error:
        raise ApiError(400, f"{error}.", param="messages") from error


def _as_message(message: Message) -> dict[str, Any] | None:
    """The message as conversation.py reads it: only an assistant's content has parts.

    None for a system message without a word: many a page sends one that nobody has filled in.
    """
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if message.parts:
        return {"role": role, "content": _answer(message.parts, content, role)}
    if role == "assistant" and not isinstance(content, str):
        return {"role": role, "content": [part.model_dump() for part in content]}
    text = _text(content, role)
    return None if role == "system" and not text.strip() else {"role": role, "content": text}


def _text(content: str | list[Part], role: str) -> str:
    """ValueError for parts that are more than text."""
    if isinstance(content, str):
        return content
    if any(part.type != "text" for part in content):
        raise ValueError(f"a {role} message may only have parts of type text")
    return "".join(part.text for part in content)


def _answer(parts: Sequence[Part], content: str | list[Part], role: str) -> list[dict[str, Any]]:
    """The parts of an answer of ours that comes back; ValueError where its content says more."""
    if role != "assistant":
        raise ValueError(f"a {role} message has no parts besides its content")
    if content != "".join(part.text for part in parts if part.type == "text"):
        raise ValueError("the content of an assistant message differs from the text of its parts")
    return [part.model_dump() for part in parts]


class _Reply:
    """The answer to one request, in the making."""

    def __init__(
        self, service: Service, body: ChatRequest, request: EngineRequest, place: Place
    ) -> None:
        self.service, self.body, self.request, self._place = service, body, request, place
        self._tokenizer: Tokenizer = service.tokenizer
        self._id, self._created = new_id("chatcmpl"), int(time.time())
        self._logs = [
            TokenLog(self._tokenizer, parts=frozenset({"text"})) for _ in range(request.n)
        ]
        self._written = 0

    async def whole(self) -> Response:
        completions = [Completion(0, row) for row in range(self.request.n)]
        entries: list[list[Any]] = [[] for _ in completions]
        async with contextlib.aclosing(self._events()) as batches:
            async for batch in batches:
                for event in batch:
                    completions[event.row].add(event)
                    entries[event.row] += self._entries(event)
        choices = [
            {
                "index": completion.row,
                "message": _message(completion),
                "logprobs": self._logprobs(entries[completion.row]),
                "finish_reason": completion.finish_reason,
            }
            for completion in completions
        ]
        return await whole_answer(self._head("chat.completion"), choices, self._usage())

    async def stream(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        beginning = {"role": "assistant", "content": ""}
        yield [self._chunk(row, beginning) for row in range(self.request.n)]
        async with contextlib.aclosing(self._events()) as batches:
            async for batch in batches:
                yield [chunk for event in batch for chunk in self._chunks(event)]
        if self.body.with_usage:
            yield [{**self._head("chat.completion.chunk"), "choices": [], **self._usage()}]

    async def _events(self) -> AsyncGenerator[Sequence[Event], None]:
        async with contextlib.aclosing(self.service.pool.run(self.request, self._place)) as batches:
            async for batch in batches:
                for event in batch:
                    self._written += event.token is not None or event.stop_id is not None
                yield batch

    def _chunks(self, event: Event) -> list[dict[str, Any]]:
        """What one event adds to the stream."""
        entries, chunks = self._entries(event), []
        if event.text or entries:
            text = event.part == "text"
            part = {"part": {"type": event.part, "text": event.text}}
            delta = {"content": event.text} if text else part
            chunks.append(self._chunk(event.row, delta, self._logprobs(entries)))
        if event.finish_reason:
            chunks.append(self._chunk(event.row, {}, finish_reason=event.finish_reason))
        return chunks

    def _entries(self, event: Event) -> list[dict[str, Any]]:
        if not self.body.logprobs:
            return []
        shown = self._logs[event.row].push(event)
        return [chat_entry(self._tokenizer, one) for _, one in shown if one.logprob is not None]

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": entries, "refusal": None} if self.body.logprobs else None

    def _chunk(
        self,
        row: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        *,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": row,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        counted = {"usage": None} if self.body.with_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **counted}

    def _head(self, kind: str) -> dict[str, Any]:
        name = self.service.settings.model_name
        return {"id": self._id, "object": kind, "created": self._created, "model": name}

    def _usage(self) -> dict[str, Any]:
        return {"usage": usage(len(self.request.ids), self._written)}


def _message(completion: Completion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    if any(part["type"] != "text" for part in completion.parts):
        message["parts"] = completion.parts
    return message
