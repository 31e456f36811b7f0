"""One connection: uvicorn's protocol, which here waits for no client for ever.

The one idea: a connection that waits for its client, to send the head of a request or to read
what was written, is looked at every `PATIENCE_S`; one that has not moved since is dropped. Left
out: bodies, which have a limit of their own and are answered (gate.py).
"""

import asyncio
import os

from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxchat.server.errors import ApiError

PATIENCE_S = 15.0
"""A client that does nothing is dropped after once to twice this time."""

OPEN_FILES = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1
"""What the process may open; -1 is no limit, or Windows, which counts otherwise."""

MAX_CONNECTIONS = min(4096, OPEN_FILES // 2) if OPEN_FILES > 0 else 4096
"""Beyond, clients are sent away; the other half is for files, devices and them."""

BACKLOG = min(128, max(8, MAX_CONNECTIONS // 8))
"""asyncio accepts so many at once, a few times over before it can send the first of them away."""


class Connection(H11Protocol):
    """uvicorn's connection with an end to its patience."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._resumed = 0
        self._seen: tuple[object, int, int] | None = None
        self._timer = self.loop.call_later(PATIENCE_S, self._look)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.write(_too_many())
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        self._resumed += 1
        super().resume_writing()

    def _look(self) -> None:
        """Drop a connection that waits for its client and has not moved since the last look."""
        between = self.cycle is None or self.cycle.response_complete
        now = (self.cycle, self._resumed, self.transport.get_write_buffer_size())
        if (between or self.flow.write_paused) and now == self._seen:
            self.transport.abort()
            return
        self._seen = now
        self._timer = self.loop.call_later(PATIENCE_S, self._look)


def _too_many() -> bytes:
    """An answer for a client that has not been listened to."""
    response = ApiError(503, "The server has too many connections.", retry_after_s=5).response()
    response.headers["Connection"] = "close"
    lines = [b"HTTP/1.1 503 Service Unavailable"]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])
