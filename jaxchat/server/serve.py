"""Run the app: uvicorn with a stop that is orderly.

The first SIGTERM or SIGINT makes `/ready` fail, closes the door and lets replies that are under way
end for a grace period; the second ends them at once. Either way the process exits with 0.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

LINES = "%(asctime)s %(levelname)s %(message)s"


class Server(uvicorn.Server):
    """uvicorn's server, but a signal is ours: it is not raised again when all is over."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: FastAPI, *, host: str, port: int, grace_s: int) -> Server:
    """A server that has not begun; port 0 takes a free one."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="on",
        access_log=False,  # the gate writes one line a request, without anything a client chose
        server_header=False,
        log_config=None,
        timeout_graceful_shutdown=grace_s,
    )
    return Server(config)


def run(app: FastAPI, *, host: str, port: int, grace_s: int) -> None:
    """Serve until a signal comes."""
    server = make_server(app, host=host, port=port, grace_s=grace_s)

    async def serve() -> None:
        def stop() -> None:
            for service in app.state.services.values():
                service.pool.draining = True
            server.force_exit = server.should_exit
            server.should_exit = True

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(number, stop)
        with socket.create_server((host, port), family=_family(host)) as listener:
            await server.serve(sockets=[listener])

    asyncio.run(serve())


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
