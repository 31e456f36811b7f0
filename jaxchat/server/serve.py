"""Run the app: uvicorn with a stop that is orderly.

The first SIGTERM or SIGINT makes `/ready` fail, closes the door and lets replies that are under way
end for a grace period; then, or at the second signal, they are told that the server stops. Either
way the process exits with 0.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from jaxchat.server.connection import BACKLOG, Connection

LINES = "%(asctime)s %(levelname)s %(message)s"

LEAVE_S = 1.0
"""What a reply that is ended may take to tell its client."""

QUEUE = 1024
"""Clients that wait to be accepted; beyond, they try again after a second."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server(uvicorn.Server):
    """uvicorn's server, but signals and the grace period are ours."""

    def __init__(self, app: FastAPI, config: uvicorn.Config, *, grace_s: float) -> None:
        super().__init__(config)
        self._state, self._grace_s = app.state, grace_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """What a signal asks for: an end in order, and at the second signal within moments."""
        for service in self._state.services.values():
            service.pool.draining = True
        if self.should_exit:
            self._end_replies()
            asyncio.get_running_loop().call_later(2 * LEAVE_S, leave)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Let more clients queue than asyncio accepts at once, which knows one number for both."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(QUEUE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let replies end; a request that has not arrived whole does not begin."""
        self._state.receiving.end()
        asyncio.get_running_loop().call_later(self._grace_s, self._end_replies)
        await super().shutdown(sockets)

    def _end_replies(self) -> None:
        self._state.replying.end()
        asyncio.get_running_loop().call_later(LEAVE_S, self._hang_up)

    def _hang_up(self) -> None:
        for connection in [*self.server_state.connections]:
            connection.transport.abort()  # its request sees that the client has left


def make_server(app: FastAPI, *, host: str, port: int, grace_s: int) -> Server:
    """A server that has not begun; port 0 takes a free one."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Connection,
        backlog=BACKLOG,
        lifespan="on",
        access_log=False,  # the gate writes one line a request, without anything a client chose
        server_header=False,
        log_config=None,
    )
    return Server(app, config, grace_s=grace_s)


def run(app: FastAPI, *, host: str, port: int, grace_s: int, name: str) -> None:
    """Serve `name` until a signal comes; then signals are ignored until the process is gone.

    OSError, with the remedy, where nobody can listen at that address.
    """
    server = make_server(app, host=host, port=port, grace_s=grace_s)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        with _listen(host, port) as listener:
            at = f"[{host}]" if ":" in host else host
            print(f"{name} at http://{at}:{listener.getsockname()[1]}", flush=True)
            for number in SIGNALS:
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(server.stop))
            try:
                await server.serve(sockets=[listener])
            finally:
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)

    asyncio.run(serve())
    if any(thread.daemon for thread in threading.enumerate()):
        leave()


def check_address(host: str, port: int) -> None:
    """OSError, as `run` raises it, before anything that takes long: a port in use is told at once.

    Nothing listens until `run`: a client that comes meanwhile is refused, not left waiting.
    """
    _listen(host, port).close()


def leave() -> None:
    """Exit at once: torch aborts when the interpreter goes while a thread is inside of it."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    """`::` is every address, those of IPv4 too wherever the system can do that."""
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=_family(host), dualstack_ipv6=both)
    except OSError as error:
        raise OSError(
            f"cannot listen at {host}:{port}: {error.strerror}; --port and --host name another "
            "address"
        ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
