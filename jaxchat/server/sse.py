"""Server-sent events: JSON documents as they come, `[DONE]` at the end.

A client that leaves is noticed at once, also while nothing is sent: the iterator is then closed,
which frees its slots. One that waits, in the queue or for a long prompt to be read, hears a comment
now and then, which clients skip: many a proxy cuts a connection on which nothing comes.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxchat.server.errors import ApiError, ascii_json

T = TypeVar("T")

KEEP_ALIVE, KEEP_ALIVE_S = b": keep-alive\n\n", 15.0
"""What is sent after so long without an event; nginx gives up after 60 s, others after 30."""


class EventStream(Response):
    """Batches of documents; those of one batch leave together."""

    media_type = "text/event-stream"

    def __init__(
        self,
        batches: AsyncGenerator[Sequence[dict[str, Any]], None],
        until_done: contextlib.ExitStack,
    ) -> None:
        """`until_done` is closed at the end of the stream, whatever that is."""
        super().__init__()
        del self.headers["content-length"]
        self.headers["X-Accel-Buffering"] = "no"
        self._batches, self._until_done = batches, until_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(client_leaves(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            self._until_done.close()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with contextlib.aclosing(self._batches) as batches:
            try:
                while (batch := await _next(batches, send)) is not None:
                    await _write(send, b"".join(map(document, batch)))
            except ApiError as error:  # the status is out already
                await _write(send, document(error.body()))
            else:
                await _write(send, b"data: [DONE]\n\n")
        await _write(send, b"", more=False)


async def _next(batches: AsyncGenerator[T, None], send: Send) -> T | None:
    """The next batch, None at the end; until it comes a sign of life every `KEEP_ALIVE_S`."""
    coming = asyncio.ensure_future(anext(batches, None))
    try:
        while not (await asyncio.wait((coming,), timeout=KEEP_ALIVE_S))[0]:
            await _write(send, KEEP_ALIVE)
        return coming.result()
    finally:  # a generator can only be closed once nobody waits for it
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


def document(content: dict[str, Any]) -> bytes:
    """One event. ASCII, so that nothing in it can end a line."""
    return f"data: {ascii_json(content)}\n\n".encode()


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def client_leaves(receive: Receive) -> None:
    """Returns when the client has gone; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
