"""`GET /`: what a browser sees. The API itself is described by `/openapi.json`."""

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from jaxchat.server.service import service_of

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """Where to go from here."""
    name = service_of(request).settings.model_name
    return PlainTextResponse(
        f"{name} answers at /v1/chat/completions and /v1/completions, as OpenAI's API does.\n"
        "/openapi.json describes every path, /metrics and /stats tell how it does.\n"
    )
