"""The ASGI app: engines, limits and paths put together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from jaxchat import __version__
from jaxchat.engine import Engine
from jaxchat.server import chat, completions, errors, status, tokens
from jaxchat.server.deadlines import Deadlines
from jaxchat.server.gate import Gate
from jaxchat.server.metrics import Families, Metrics
from jaxchat.server.page import page_routes
from jaxchat.server.pool import Pool
from jaxchat.server.service import ClientLeft, Service
from jaxchat.server.settings import ServerSettings
from jaxchat.server.worker import Worker


def create_app(
    engines: Sequence[Engine],
    settings: ServerSettings,
    others: Mapping[str, Sequence[Engine]] | None = None,
) -> FastAPI:
    """The app over engines with the same model; they warm up when the app starts.

    `others`: engines of further models by name, such as the other stages of training.
    """
    families, receiving, replying = Families(), Deadlines(), Deadlines()
    services = {
        name: _service(group, replace(settings, model_name=name), families, replying)
        for name, group in {settings.model_name: engines, **(others or {})}.items()
    }
    pools = [service.pool for service in services.values()]

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        for pool in pools:
            pool.start()
        yield
        await asyncio.gather(*(pool.stop() for pool in pools))

    app = FastAPI(
        title="jaxchat",
        version=__version__,
        description="A model of this project behind the API of OpenAI's clients.",
        docs_url=None,  # both load their scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        default_response_class=errors.AsciiJSON,
        redirect_slashes=False,  # a redirect names our address, not a proxy's; see the gate
    )
    app.state.services = services
    app.state.receiving, app.state.replying = receiving, replying
    errors.install(app)
    app.add_exception_handler(ClientLeft, _nobody_reads)
    for module in (chat, completions, tokens, status):
        app.include_router(module.router)
    app.router.routes.extend(page_routes())
    app.add_middleware(Gate, settings=settings, families=families, receiving=receiving)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client sends many of its own
            expose_headers=["Retry-After", "X-Should-Retry"],
        )
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


def _service(
    engines: Sequence[Engine], settings: ServerSettings, families: Families, replying: Deadlines
) -> Service:
    name = settings.model_name
    workers = [Worker(engine, name=f"{name}-replica-{i}") for i, engine in enumerate(engines)]
    metrics = Metrics(families, name, workers)
    pool = Pool(
        workers,
        metrics,
        max_waiting=settings.max_waiting,
        timeout_s=settings.timeout_s,
        replying=replying,
    )
    return Service(pool, engines[0].tokenizer, settings, metrics)


def _schema(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema without status 422, which this server words as 400, and with its keys."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            servers=[{"url": "."}],  # where the schema lies, be that below a path of a proxy
        )
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{}, {"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema


async def _nobody_reads(_request: Request, _error: Exception) -> Response:
    return Response(status_code=errors.CLIENT_LEFT)
