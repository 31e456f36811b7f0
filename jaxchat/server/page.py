"""The chat page's routes: its files, and Markdown turned into safe HTML.

    app = Starlette(routes=[*api_routes, *page_routes()])

The one idea: the page is a folder of standard HTML, CSS and ES modules, served as it lies there
under a policy that lets it run only its own scripts and talk only to its own origin. Conversations
live in the browser; nothing here remembers anything. Left out: the API that the page talks to.
"""

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from jaxchat.server.errors import CLIENT_LEFT, TYPES
from jaxchat.server.markdown import render_all

PAGE_DIR = Path(__file__).parent / "page"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""What the folder may hold; other files in it are not served."""

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # text becomes markup in one place only, the policy of this name in page/markdown.js
        "require-trusted-types-for 'script'",
        "trusted-types jaxchat-markdown",
    ]
)

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

PREFIX = re.compile(r"(/[\w.~@%+-]+)+", re.ASCII)
"""What may be said to be the page's path at a proxy, as jupyter-server-proxy and Traefik do."""

MAX_MARKDOWN_BYTES = 512 * 1024
"""Of a request to turn Markdown into HTML; a reply of 4,096 tokens has about 20 kB."""

MAX_MARKDOWN_TEXTS = 64
"""Messages in one such request."""

RENDER_THREADS = 2
"""Requests rendered at once: rendering takes time from the thread that drives the engine."""

MAX_WAITING = 16
"""Requests that wait to be rendered, each with its texts in memory; nobody is asked for a key. The
page shows plain text where it hears of more."""


def page_routes() -> list[BaseRoute]:
    """`/`, `/page/NAME` for every file of the page, and `POST /page/markdown`."""
    files = {path.name: path for path in PAGE_DIR.iterdir() if path.suffix in MEDIA_TYPES}
    limiter = anyio.CapacityLimiter(RENDER_THREADS)
    return [
        Route("/", _index(files.pop("index.html"))),
        *(Route(f"/page/{name}", _file(path)) for name, path in sorted(files.items())),
        Route("/page/markdown", partial(_markdown, limiter), methods=["POST"]),
    ]


def _file(path: Path) -> Any:
    """An endpoint that answers with a file as it was when the server started."""
    content = path.read_bytes()
    return lambda request: _answer(request, content, MEDIA_TYPES[path.suffix])


def _index(path: Path) -> Any:
    """The page itself. Below a path of a proxy that tells it, it begins with what adds a slash."""
    content = path.read_text()

    def endpoint(request: Request) -> Response:
        prefix = request.headers.get("x-forwarded-prefix", "").rstrip("/")
        script = f'<script src="{prefix}/page/slash.js"></script>' * bool(PREFIX.fullmatch(prefix))
        page = content.replace("<head>", f"<head>{script}", 1)
        return _answer(request, page.encode(), MEDIA_TYPES[path.suffix])

    return endpoint


def _answer(request: Request, content: bytes, media_type: str) -> Response:
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    # asked for again every time, sent again only when changed: no stale page after an update
    headers = {**HEADERS, "ETag": etag, "Cache-Control": "no-cache"}
    if etag in request.headers.get("if-none-match", ""):  # a proxy that zips makes it W/"..."
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


async def _markdown(limiter: anyio.CapacityLimiter, request: Request) -> Response:
    """`{"texts": [...]}` in, `{"html": [...]}` out, in the same order."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        return _error(415, "the body must be application/json")  # which no other site can send
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_MARKDOWN_BYTES:
            return _error(413, f"the body has more than {MAX_MARKDOWN_BYTES} bytes")
    if limiter.statistics().tasks_waiting >= MAX_WAITING:
        return _error(503, f"{MAX_WAITING} requests wait to be rendered already")
    try:
        texts = _texts(bytes(body))
    except ValueError as error:
        return _error(400, str(error))
    async with limiter:
        if await request.is_disconnected():  # while it waited
            return Response(status_code=CLIENT_LEFT)
        html = await anyio.to_thread.run_sync(render_all, texts)
    return JSONResponse({"html": html}, headers=HEADERS)


def _texts(body: bytes) -> list[str]:
    try:
        document = json.loads(body)
    except RecursionError:
        raise ValueError("the body is nested too deep") from None
    texts = document.get("texts") if isinstance(document, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('the body must be {"texts": [strings]}')
    if len(texts) > MAX_MARKDOWN_TEXTS:
        raise ValueError(f"{len(texts)} texts in one request, at most {MAX_MARKDOWN_TEXTS}")
    return texts


def _error(status: int, message: str) -> Response:
    """An error with OpenAI's body."""
    kind = TYPES.get(status, TYPES[400])
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status, headers=HEADERS)
