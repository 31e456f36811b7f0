"""Errors as OpenAI's API words them: one body, the right status, never an echo of the prompt."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

CLIENT_LEFT = 499
"""nginx's status of a client that has left before its answer: nobody reads it, metrics count it."""

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    CLIENT_LEFT: "client_left",
    500: "server_error",
    503: "overloaded_error",
}
"""What each status of the API is called; page.py words those of its own routes itself."""

REASONS = {
    400: "The request is not valid.",
    401: "The API key is missing or wrong.",
    403: "The request names a host that is not this server.",
    404: "There is no such model or path.",
    405: "The path knows no such method.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    429: "This key has sent too many requests.",
    500: "The server failed.",
    503: "The server is busy, starting or stopping.",
}


MOST_FAULTS, FAULTS_TOLD = 100, 5
"""Of a body that may be full of them, so many are looked at and told."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        final: bool = False,
    ) -> None:
        """`final`: asking again, as OpenAI's clients do by themselves, would end the same way."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s, self.final = retry_after_s, final

    def body(self) -> dict[str, Any]:
        detail = ErrorDetail(
            message=str(self), type=TYPES[self.status], param=self.param, code=self.code
        )
        return {"error": detail.model_dump()}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.final:
            headers["X-Should-Retry"] = "false"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return AsciiJSON(self.body(), self.status, headers)


def stopping() -> ApiError:
    """What a server that has been told to stop says."""
    return ApiError(503, "The server is stopping.", retry_after_s=10)


class AsciiJSON(JSONResponse):
    """JSON in ASCII: half a surrogate pair, which UTF-8 cannot hold, is escaped like the rest."""

    def render(self, content: Any) -> bytes:
        return ascii_json(content).encode()


def ascii_json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=True, allow_nan=False)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that a path answers with, for its OpenAPI schema."""
    always = (403, 405, 500)
    return {
        status: {"model": ErrorBody, "description": REASONS[status]}
        for status in sorted({*statuses, *always})
    }


def install(app: FastAPI) -> None:
    """Make every error of `app` one of these."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


async def _api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    """What pydantic found, without the values: they may be somebody's words."""
    assert isinstance(error, RequestValidationError)
    found = _nearest([_fault(one, error.body) for one in error.errors()[:MOST_FAULTS]])
    told = dict.fromkeys((".".join(fault.path), fault.text) for fault in found)  # each once
    message = "; ".join(f"{path}: {text}" if path else text for path, text in [*told][:FAULTS_TOLD])
    return ApiError(400, message, param=".".join(found[0].path) or None).response()


class _Fault(NamedTuple):
    """What pydantic found wrong, in the words of those who wrote the body."""

    path: tuple[str, ...]
    """`messages`, `0`, `role`: where in the body it is."""
    text: str
    union: tuple[str, ...] | None
    """Where one of several types was tried that this is about, if so."""
    of_type: bool
    """Whether the value is of another type altogether."""


def _fault(one: dict[str, Any], body: Any) -> _Fault:
    location, kind = one["loc"][1:], one["type"]
    if kind == "json_invalid":
        return _Fault((), f"the body is not JSON (at {location[0]})", None, False)
    path, union = _place(location, body, missing=kind == "missing")
    refused = kind == "none_required" or one.get("ctx", {}).get("max_length") == 0
    text = "not supported: leave it out" if refused else one["msg"]
    return _Fault(path, text, union, kind.endswith("_type"))


def _place(
    location: Sequence[Any], body: Any, *, missing: bool
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The path in the body, and the first place where `location` names a type instead of a part.

    pydantic mixes both, as in `messages.0.content.list[Part].0.type`; the body tells them apart.
    """
    path: tuple[str, ...] = ()
    union = None
    for index, part in enumerate(location):
        is_key = isinstance(body, dict) and part in body
        is_index = isinstance(body, list) and isinstance(part, int)
        if is_key or is_index:
            body = body[part]
        elif not (missing and index == len(location) - 1):
            union = path if union is None else union
            continue
        path = (*path, str(part))
    return path, union


def _nearest(faults: Sequence[_Fault]) -> list[_Fault]:
    """Of the types that a value may have, the faults of the one that was most nearly meant.

    That is where pydantic got furthest, or where the type at least was right.
    """

    def nearness(fault: _Fault) -> tuple[int, bool]:
        return len(fault.path), not fault.of_type

    best: dict[tuple[str, ...] | None, tuple[int, bool]] = {}
    for fault in faults:
        best[fault.union] = max(nearness(fault), best.get(fault.union, (0, False)))
    return [one for one in faults if one.union is None or nearness(one) == best[one.union]]


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = error.status_code if error.status_code in TYPES else 400
    message = {
        404: f"There is no {request.url.path} here; /openapi.json lists what there is.",
        405: f"{request.url.path} knows no {request.method}.",
    }.get(status, str(error.detail))
    response = ApiError(status, message).response()
    response.headers.update(error.headers or {})
    return response
