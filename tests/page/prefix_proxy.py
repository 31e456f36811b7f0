"""A proxy that serves another server below a path, which it strips; beside that path is nothing.

So do jupyter-server-proxy (`/user/x/proxy/8000/`) and nginx (`location /chat/`). As the former, it
passes on at once only what the client accepts as a stream of events.
"""

from collections.abc import AsyncIterator

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from jaxchat.server.sse import KEEP_ALIVE
from tests.page.app_thread import DEADLINE_S, AppThread

OF_ONE_CONNECTION = {"connection", "transfer-encoding", "keep-alive"}


class PrefixProxy(AppThread):
    """Serves `upstream` below `prefix`, which ends with a slash."""

    def __init__(self, upstream: str, prefix: str, *, tells: bool) -> None:
        """`tells`: in a header, which prefix it strips. Without its slash it is served as well."""
        self._upstream = upstream
        self._told = {"X-Forwarded-Prefix": prefix.rstrip("/")} if tells else {}
        self.strays: list[str] = []
        """Paths that were asked for outside of the prefix, where another application would be."""
        self.signs_of_life = 0
        """That have come in streams of events while these had nothing to tell."""
        routes = [
            Route(f"{prefix}{{path:path}}", self._forward, methods=["GET", "POST"]),
            Route(prefix.rstrip("/"), self._forward),
            Route("/{path:path}", self._stray, methods=["GET", "POST"]),
        ]
        super().__init__(Starlette(routes=routes))

    async def _forward(self, request: Request) -> Response:
        client = httpx.AsyncClient(base_url=self._upstream, timeout=DEADLINE_S)
        own = {k: v for k, v in request.headers.items() if k in ("authorization", "content-type")}
        path, body = f"/{request.path_params.get('path', '')}", await request.body()
        sent = client.build_request(request.method, path, headers=own | self._told, content=body)
        answer = await client.send(sent, stream=True)
        if request.headers.get("accept") != "text/event-stream":
            await answer.aread()
        headers = {k: v for k, v in answer.headers.items() if k not in OF_ONE_CONNECTION}

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_bytes():
                    self.signs_of_life += piece.count(KEEP_ALIVE)
                    yield piece
            finally:  # also where the browser leaves
                await client.aclose()

        return StreamingResponse(pieces(), answer.status_code, headers)

    async def _stray(self, request: Request) -> Response:
        self.strays.append(request.url.path)
        return Response(status_code=404)
