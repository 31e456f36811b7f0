"""`/v1/completions`: text or token ids in, what follows out; with `echo` also what they score."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from jaxchat.backend import PromptScores
from jaxchat.request import Event
from jaxchat.request import Request as EngineRequest
from jaxchat.sampling_params import SamplingParams
from jaxchat.server import responses
from jaxchat.server.chat import GENERATION_ERRORS, STREAMED
from jaxchat.server.errors import ApiError
from jaxchat.server.logprobs import CompletionLog, TokenLog
from jaxchat.server.pool import Place
from jaxchat.server.requests import CompletionRequest
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

router = APIRouter()

MAX_TOKENS = 16
"""Of a request that names no limit, as in OpenAI's API."""


@router.post(
    "/v1/completions",
    response_model=responses.Completion,
    responses={**STREAMED, **GENERATION_ERRORS},
    operation_id="complete",
)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """What follows one or several texts."""
    service = service_of(request, body.model)
    given, n = body.prompt, body.n or 1
    texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else [*given]
    with contextlib.ExitStack() as until_done:
        place = until_done.enter_context(contextlib.closing(service.reserve(len(texts) * n)))
        prompts = await run_in_threadpool(_prompts, service, body, texts)
        reply = _Reply(service, body, prompts, place)
        if body.stream:
            return EventStream(reply.stream(), until_done.pop_all())
        return await while_connected(request, reply.whole())


def _prompts(
    service: Service, body: CompletionRequest, texts: Sequence[str | list[int]]
) -> list[EngineRequest]:
    """One engine request for every prompt; everything that can be wrong is found here."""
    wanted = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if not wanted and not body.echo:
        raise ApiError(400, "max_tokens=0 asks for nothing without echo.", param="max_tokens")
    if body.add_special_tokens is False and any(isinstance(text, str) for text in texts):
        raise ApiError(
            400,
            "A text begins with <|bos|>: send token ids to begin otherwise.",
            param="add_special_tokens",
        )

    def params() -> SamplingParams:
        """Of each prompt its own: equal ones differ, unless the request names a seed."""
        return service.sampling(
            body,
            max_tokens=max(1, wanted),
            seed=random_seed(),
            temperature=1.0,
            top_k=0,
            top_logprobs=body.logprobs or 0,
        )

    n = body.n or 1
    prompts = [_prompt(service, text, params(), n, wanted) for text in texts]
    shown = sum(wanted + (len(prompt.ids) if body.echo else 0) for prompt in prompts)
    service.check_logprobs(n * shown, body.logprobs)
    return prompts


def _prompt(
    service: Service, text: str | list[int], params: SamplingParams, n: int, wanted: int
) -> EngineRequest:
    ids = (
        [service.tokenizer.bos_id, *service.tokenizer.encode(text)]
        if isinstance(text, str)
        else list(text)
    )
    service.room(len(ids), wanted, param="prompt")
    request = EngineRequest(ids, params, n=n, tools=False)
    service.check(request, param="prompt")
    return request


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what is under way and wait until it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Reply:
    """The answer to one request, in the making."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        prompts: list[EngineRequest],
        place: Place,
    ) -> None:
        self.service, self.body, self.prompts, self._place = service, body, prompts, place
        self._id, self._created = new_id("cmpl"), int(time.time())
        self._written = 0

    async def whole(self) -> Response:
        tasks = [
            asyncio.ensure_future(self._whole_prompt(number)) for number in range(len(self.prompts))
        ]
        try:
            groups = await asyncio.gather(*tasks)
        finally:  # one that fails ends its siblings
            await _end(tasks)
        choices = [choice for group in groups for choice in group]
        return await whole_answer(self._head(), choices, self._usage())

    async def _whole_prompt(self, number: int) -> list[dict[str, Any]]:
        """The choices of one prompt: its chunks, put together."""
        choices: dict[int, dict[str, Any]] = {}
        async with contextlib.aclosing(self._prompt(number)) as batches:
            async for batch in batches:
                for chunk in batch:
                    whole = choices.setdefault(chunk["index"], chunk)
                    if whole is chunk:
                        continue
                    whole["text"] += chunk["text"]
                    whole["finish_reason"] = chunk["finish_reason"]
                    for name, values in (chunk["logprobs"] or {}).items():
                        whole["logprobs"][name] += values
        return [choices[index] for index in sorted(choices)]

    async def stream(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        counted = {"usage": None} if self.body.with_usage else {}
        async with contextlib.aclosing(self._merged()) as batches:
            async for batch in batches:
                yield [{**self._head(), "choices": [choice], **counted} for choice in batch]
        if self.body.with_usage:
            yield [{**self._head(), "choices": [], **self._usage()}]

    async def _merged(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The chunks of all prompts as they come, of each one batch at a time.

        What is not read is not asked for, so that the time of the request can run out meanwhile.
        """
        prompts = [self._prompt(number) for number in range(len(self.prompts))]
        coming = {asyncio.ensure_future(anext(batches, None)): batches for batches in prompts}
        try:
            while coming:
                for task in (await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED))[0]:
                    batches = coming.pop(task)
                    batch = task.result()  # raises where it has failed
                    if batch is not None:
                        yield batch
                        coming[asyncio.ensure_future(anext(batches, None))] = batches
        finally:  # one that fails ends its siblings
            await _end([*coming])
            for batches in prompts:
                await batches.aclose()

    async def _prompt(self, number: int) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The chunks of one prompt; the first of each choice holds the echo."""
        request, n = self.prompts[number], self.body.n or 1
        echo = await self._echo(number) if self.body.echo else []
        start = len(echo[0]["text"]) if echo else 0
        for chunk in echo:  # each on its own: it may be long
            yield [chunk]
        if self.body.max_tokens == 0:
            return
        logs = [TokenLog(self.service.tokenizer) for _ in range(n)]
        async with contextlib.aclosing(self.service.pool.run(request, self._place)) as batches:
            async for batch in batches:
                out = []
                for event in batch:
                    self._written += event.token is not None or event.stop_id is not None
                    chunk = self._chunk(number * n + event.row, event.text)
                    chunk["finish_reason"] = event.finish_reason
                    chunk["logprobs"] = self._log(logs[event.row], event, start)
                    told = chunk["logprobs"] and chunk["logprobs"]["tokens"]
                    if event.text or event.finish_reason or told:
                        out.append(chunk)
                yield out

    async def _echo(self, number: int) -> list[dict[str, Any]]:
        """A chunk with the prompt for each of its choices, which share what its log is made of."""
        ids, n = list(self.prompts[number].ids), self.body.n or 1
        lists: dict[str, list[Any]] = {}
        if self.body.logprobs is not None:
            scores = await self.service.pool.score_prompt(ids, self._place)
            lists = await run_in_threadpool(self._prompt_log, ids, scores)
        text = self._shown(ids)
        chunks = [self._chunk(number * n + row, text) for row in range(n)]
        for chunk in chunks:
            chunk["finish_reason"] = "length" if self.body.max_tokens == 0 else None
            chunk["logprobs"] = {name: [*values] for name, values in lists.items()} or None
        return chunks

    def _log(self, log: TokenLog, event: Event, start: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        lists = CompletionLog(self.service.tokenizer, self.body.logprobs)
        for offset, shown in log.push(event):
            lists.add(shown, start + offset)
        return lists.lists

    def _prompt_log(self, ids: list[int], scores: PromptScores) -> dict[str, list[Any]]:
        lists = CompletionLog(self.service.tokenizer, self.body.logprobs or 0)
        lists.add_prompt(ids, scores)
        return lists.lists

    def _shown(self, ids: list[int]) -> str:
        """The text of a prompt, without its special tokens."""
        first_special = self.service.tokenizer.special_id("bos")
        return self.service.tokenizer.decode(id for id in ids if id < first_special)

    def _chunk(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def _head(self) -> dict[str, Any]:
        name = self.service.settings.model_name
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": name,
        }

    def _usage(self) -> dict[str, Any]:
        return {"usage": usage(sum(len(one.ids) for one in self.prompts), self._written)}
