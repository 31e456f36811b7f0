"""What every request passes before its path is looked at: host, key, rate, size, headers.

A plain ASGI layer: it reads no body, so a refused request costs next to nothing.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
import time
from collections.abc import Callable, Sequence
from http import HTTPMethod, HTTPStatus

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxchat.server.deadlines import Deadlines
from jaxchat.server.errors import CLIENT_LEFT, ApiError, stopping
from jaxchat.server.metrics import Families
from jaxchat.server.settings import ServerSettings

log = logging.getLogger("jaxchat.server")

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json"})
"""Paths that need no key: they tell nothing of anybody, and a page must load to ask for the key."""

PROBE_PATHS = frozenset({"/health", "/ready"})
"""Paths that answer under any name: a probe of Kubernetes names the pod by its address."""

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
"""Of every answer that does not set its own."""

OPEN_PREFIX = "/page/"
"""What the page is made of, and its Markdown, which has limits of its own."""

DRAINED_BODIES = 4
"""Of a body that is refused so many times the limit are read, so that the client hears why."""

DRAIN_S = 3.0
"""And for no longer than this."""

LOGGED_PATH = 100
"""Characters of a path at most; a client may send 64 kB."""

BODY_S = 30.0
"""What a client may take to send a body: a MB at 35 kB/s."""


class Gate:
    """The layer around the app."""

    def __init__(
        self, app: ASGIApp, *, settings: ServerSettings, families: Families, receiving: Deadlines
    ) -> None:
        """`receiving`: of bodies that have not arrived whole."""
        self._app, self._settings, self._families = app, settings, families
        self._receiving = receiving
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)
        self._keys = Keys(settings.api_keys)
        self._rates = RateLimit(settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}  # /v1/models/ is /v1/models
        method = scope["method"] if scope["method"] in HTTPMethod.__members__ else "(other)"
        start = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name.lower() for name, _ in message["headers"]}
                missing = [header for header in HEADERS if header[0] not in present]
                message = {**message, "headers": [*message["headers"], *missing]}
            await send(message)

        try:
            try:
                self._admit(scope)
            except ApiError as error:
                await self._drain(scope, receive)
                await error.response()(scope, receive, send_with_headers)
                return
            try:
                await self._app(scope, self._limited(receive), send_with_headers)
            except Exception:  # our own bug; the log has it, the client hears that there is one
                log.exception("%s %r failed", method, scope["path"][:LOGGED_PATH])
                if not status:
                    error = ApiError(500, "The server failed; its log says more.")
                    await error.response()(scope, receive, send_with_headers)
        finally:
            route = scope.get("route")  # the pattern, so that strangers cannot invent labels
            path = getattr(route, "path", "(none)")
            self._families.answered(path, status)
            seconds = time.perf_counter() - start
            quiet = route is None and status < HTTPStatus.BAD_REQUEST  # the page's files
            level = logging.DEBUG if quiet else logging.INFO
            log.log(level, "%s %s %d %.3fs", method, path, status, seconds)

    def _admit(self, scope: Scope) -> None:
        """ApiError for a request that goes no further."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = _host_name(headers.get(b"host", ""))
        if self._hosts and host not in self._hosts and scope["path"] not in PROBE_PATHS:
            raise ApiError(
                403,
                f"This server does not answer as {host!r}; start it with --allowed-hosts {host}"
                " if it should.",
            )
        length = headers.get(b"content-length", "0")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_PREFIX):
            return
        key = self._keys.find(headers.get(b"authorization", ""))
        if key is not None:
            self._rates.spend(key)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that refuses a body longer or later than it may be, whatever its headers say.

        HTTPException, because FastAPI lets nothing else through where it reads a body.
        """
        clock = asyncio.get_running_loop().time
        read, whole, deadline = 0, False, clock() + BODY_S

        async def limited() -> Message:
            nonlocal read, whole
            if whole:  # what follows is the client's leave
                return await receive()
            try:
                async with self._receiving.limit(deadline - clock()):
                    message = await receive()
            except TimeoutError:
                raise self._too_late() from None
            if message["type"] == "http.disconnect":
                raise HTTPException(CLIENT_LEFT, "The client has left.")
            whole = not message.get("more_body")
            read += len(message.get("body", b""))
            if read > self._settings.max_body_bytes:
                raise HTTPException(413, str(self._too_large()))
            return message

        return limited

    async def _drain(self, scope: Scope, receive: Receive) -> None:
        """Read what a refused client still sends, within reason."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        left = DRAINED_BODIES * self._settings.max_body_bytes
        with contextlib.suppress(TimeoutError):
            async with self._receiving.limit(DRAIN_S):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body"):
                        return

    def _too_late(self) -> HTTPException:
        headers = {"Connection": "close"}
        if self._receiving.over:
            error = stopping()
            headers["Retry-After"] = str(error.retry_after_s)
        else:
            error = ApiError(408, f"The body took longer than {BODY_S:g} s to arrive.")
        return HTTPException(error.status, str(error), headers)

    def _too_large(self) -> ApiError:
        most = self._settings.max_body_bytes
        return ApiError(413, f"The body is longer than the {most:,} bytes that are allowed.")


class Keys:
    """API keys, compared in constant time and kept as hashes."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [
            (number, hashlib.sha256(sent).digest())
            for number, key in enumerate(keys)
            for sent in _spellings(key)
        ]

    def find(self, authorization: str) -> int | None:
        """The number of the key in an `Authorization: Bearer KEY` header; None if none is asked.

        The header is read as Latin-1, in which every byte is a character. ApiError 401 when it is
        none of ours.
        """
        if not self._digests:
            return None
        scheme, _, key = authorization.partition(" ")
        # spaces alone: of the bytes of a letter, Latin-1 takes some for other blanks
        digest = hashlib.sha256(key.strip(" \t").encode("latin-1")).digest()
        equal = [hmac.compare_digest(digest, one) for _, one in self._digests]  # all, always
        if scheme.lower() != "bearer" or not any(equal):
            raise ApiError(
                401,
                "Give one of this server's API keys as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )
        return self._digests[equal.index(True)][0]


def _spellings(key: str) -> set[bytes]:
    """A key as clients put it into a header: curl in UTF-8, a browser in Latin-1."""
    spellings = {key.encode()}
    with contextlib.suppress(UnicodeEncodeError):  # which no browser can send
        spellings.add(key.encode("latin-1"))
    return spellings


class RateLimit:
    """A bucket of requests for each key, which fills at an even pace."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[int, tuple[float, float]] = {}
        """(requests left, when that was) of each key."""

    def spend(self, key: int) -> None:
        """Take one request. ApiError 429 when none is left."""
        if not self._per_minute:
            return
        now = self._clock()
        left, then = self._buckets.get(key, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - then) * self._per_minute / 60)
        if left < 1:
            wait_s = (1 - left) * 60 / self._per_minute
            raise ApiError(
                429,
                f"This key may send {self._per_minute} requests a minute.",
                code="rate_limit_exceeded",
                retry_after_s=math.ceil(wait_s),
            )
        self._buckets[key] = (left - 1, now)


def _host_name(host: str) -> str:
    """`localhost` of `localhost:8000`, `::1` of `[::1]:8000`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
