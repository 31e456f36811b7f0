"""A synchronous client of an ASGI application, without a socket."""

import asyncio

import httpx


class Client:
    """`get` and `post` as httpx has them."""

    def __init__(self, app) -> None:
        self.app = app

    def get(self, path: str, **options) -> httpx.Response:
        return asyncio.run(self._send("GET", path, options))

    def post(self, path: str, **options) -> httpx.Response:
        return asyncio.run(self._send("POST", path, options))

    async def _send(self, method: str, path: str, options) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **options)
