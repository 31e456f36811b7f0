"""An ASGI application on a port of its own, in a thread of its own."""

import asyncio
import contextlib
import socket
import threading
import time
from typing import Self

import uvicorn
from starlette.types import ASGIApp

DEADLINE_S = 120.0
"""For what must come, on however busy a machine: it costs only where that does not come."""


class AppThread:
    """Answers at `url` while it is used as a context manager."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __enter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(self._app, log_level="critical", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name=type(self).__name__)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def __exit__(self, *exc_info: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        with contextlib.suppress(OSError):
            self._socket.close()
