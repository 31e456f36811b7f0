"""A synchronous client of an ASGI application, without a socket."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx


class Client:
    """`get` and `post` as httpx has them."""

    def __init__(self, app) -> None:
        self.app = app

    def get(self, path: str, **options) -> httpx.Response:
        return self._run("GET", path, options)

    def post(self, path: str, **options) -> httpx.Response:
        return self._run("POST", path, options)

    def _run(self, method: str, path: str, options) -> httpx.Response:
        # in a thread of its own: playwright has an event loop in this one
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(self._send(method, path, options))).result()

    async def _send(self, method: str, path: str, options) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **options)
