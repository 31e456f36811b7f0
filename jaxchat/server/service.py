"""What every path works with, and what they do alike."""

import asyncio
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from jaxchat.request import Request as EngineRequest
from jaxchat.sampling_params import SamplingParams
from jaxchat.server.errors import ApiError, ascii_json
from jaxchat.server.metrics import Metrics
from jaxchat.server.pool import Place, Pool
from jaxchat.server.requests import Sampling
from jaxchat.server.settings import ServerSettings
from jaxchat.server.sse import client_leaves
from jaxchat.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass
class Service:
    """One model's parts; a server has one for each of its models."""

    pool: Pool
    tokenizer: Tokenizer
    settings: ServerSettings
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its reply may have."""
        return self.pool.workers[0].engine.max_length

    def reserve(self, replies: int) -> Place:
        """`Pool.reserve`; ApiError 400 for more replies than one request may have."""
        most = min(self.settings.max_samples, self.pool.most)
        if replies > most:
            raise ApiError(
                400, f"{replies} replies in one request (prompts x n), at most {most}.", param="n"
            )
        return self.pool.reserve(replies)

    def room(self, prompt_tokens: int, max_tokens: int | None, *, param: str) -> int:
        """Tokens that the reply may have. ApiError 400, with the numbers, when they do not fit."""
        context = self.max_length
        wanted = 1 if max_tokens is None else max_tokens
        if prompt_tokens + wanted > context:
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the {param}, {wanted} in the "
                "completion). Shorten one of them.",
                param=param,
                code="context_length_exceeded",
            )
        return context - prompt_tokens if max_tokens is None else max_tokens

    def check_logprobs(self, tokens: int, top: int | None) -> None:
        """ApiError 400, with the numbers, where an answer of so many tokens would have too many.

        `top`: alternatives to each token; None where no log-probabilities are asked for.
        """
        each = 0 if top is None else top + 1
        most = self.settings.max_logprobs
        if tokens * each > most:
            raise ApiError(
                400,
                f"Up to {tokens:,} tokens in all replies x {each} log-probabilities are "
                f"{tokens * each:,}, at most {most:,}. Ask for fewer of one of them.",
                param="logprobs",
            )

    def sampling(self, body: Sampling, **options: Any) -> SamplingParams:
        """`body.sampling(**options)`; ApiError 400 for values that do not fit or go together."""
        try:
            params = body.sampling(**options)
        except ValueError as error:
            raise ApiError(400, f"{error}.") from error
        # with a prompt that is sound, only the tokens that are named can be at fault
        self.check(EngineRequest([self.tokenizer.bos_id], params), param="logit_bias")
        return params

    def check(self, request: EngineRequest, *, param: str) -> None:
        """ApiError 400 for what the engine would refuse."""
        try:
            self.pool.check(request)
        except ValueError as error:
            raise ApiError(400, f"{error}.", param=param) from error


def services_of(request: Request) -> dict[str, Service]:
    """The server's models by name; the first is meant where a request names none."""
    return request.app.state.services


def service_of(request: Request, name: str | None = None) -> Service:
    """The model that a request asks for. ApiError 404 for one that is not ours."""
    services = services_of(request)
    if name is None:
        return next(iter(services.values()))
    if name not in services:
        raise ApiError(
            404,
            f"The model {name[:100]!r} does not exist; this server has "
            f"{', '.join(map(repr, services))}.",
            param="model",
            code="model_not_found",
        )
    return services[name]


def new_id(kind: str) -> str:
    """A fresh id such as `chatcmpl-2f0c...`."""
    return f"{kind}-{secrets.token_hex(12)}"


def random_seed() -> int:
    """Of a request that names none."""
    return secrets.randbits(63)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


async def whole_answer(
    head: dict[str, Any], choices: Sequence[dict[str, Any]], tail: dict[str, Any]
) -> Response:
    """The answer `{**head, "choices": choices, **tail}`, put into words beside the event loop."""
    return await run_in_threadpool(_whole_answer, head, choices, tail)


def _whole_answer(
    head: dict[str, Any], choices: Sequence[dict[str, Any]], tail: dict[str, Any]
) -> Response:
    # one by one: all threads wait for a call of json, 1.6 s for 16 choices with 20 alternatives
    told = ", ".join(map(ascii_json, choices))
    body = f'{ascii_json(head)[:-1]}, "choices": [{told}], {ascii_json(tail)[1:]}'
    return Response(body, media_type="application/json")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(client_leaves(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class ClientLeft(Exception):
    """Nobody reads the answer any more."""
