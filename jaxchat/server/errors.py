"""Errors as OpenAI's API words them: one body, the right status, never an echo of the prompt."""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
"""What each status is called; every status that the server answers with is here."""

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
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        detail = ErrorDetail(
            message=str(self), type=TYPES[self.status], param=self.param, code=self.code
        )
        return {"error": detail.model_dump()}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return AsciiJSON(self.body(), self.status, headers)


def stopping() -> ApiError:
    """What a server that has been told to stop says."""
    return ApiError(503, "The server is stopping.", retry_after_s=10)


class AsciiJSON(JSONResponse):
    """JSON in ASCII: half a surrogate pair, which UTF-8 cannot hold, is escaped like the rest."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False).encode()


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
    found = [(_path(one["loc"]), one["msg"]) for one in error.errors()]
    message = "; ".join(f"{path}: {text}" if path else text for path, text in found[:5])
    return ApiError(400, message, param=found[0][0] or None).response()


def _path(location: tuple[Any, ...]) -> str:
    """`messages.0.role` for where in the body something is."""
    return ".".join(str(part) for part in location[1:])


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
