"""What the server has and how it does: models, health, readiness, metrics."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from jaxchat.server import responses
from jaxchat.server.errors import AsciiJSON, documented
from jaxchat.server.service import Service, service_of, services_of

router = APIRouter()

KEYED = documented(401, 429)


@router.get("/v1/models", response_model=responses.ModelList, responses=KEYED)
async def models(request: Request) -> Response:
    """The models that this server has; the first answers where a request names none."""
    cards = [_card(service) for service in services_of(request).values()]
    return AsciiJSON({"object": "list", "data": cards})


@router.get(
    "/v1/models/{model}", response_model=responses.ModelCard, responses=documented(401, 404, 429)
)
async def model(model: str, request: Request) -> Response:
    """A model by its id."""
    return AsciiJSON(_card(service_of(request, model)))


# HEAD is what load balancers ask; the schema has one line for both
@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=responses.Health, responses=documented())
async def health(request: Request) -> Response:
    """Whether the process lives."""
    is_ready = all(service.pool.ready for service in services_of(request).values())
    return AsciiJSON({"status": "ok", "ready": is_ready})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_model=responses.Health, responses=documented(503))
async def ready(request: Request) -> Response:
    """Whether requests are taken: not before warm-up, not while stopping, not after a failure."""
    for service in services_of(request).values():
        service.pool.check_ready()
    return AsciiJSON({"status": "ok", "ready": True})


@router.get(
    "/metrics",
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Metrics."},
        **KEYED,
    },
    response_class=Response,
)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    text = service_of(request).metrics.text()
    return Response(text, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


@router.get("/stats", response_model=responses.Stats, responses=KEYED)
async def stats(request: Request) -> Response:
    """The replicas, one by one."""
    services = services_of(request).values()
    replicas = [
        {
            "name": worker.name,
            "device": worker.engine.backend.devices.description,
            "slots": worker.engine.slots,
            "load": worker.load,
            "available": worker.available,
        }
        for service in services
        for worker in service.pool.workers
    ]
    answer = {
        "model": service_of(request).settings.model_name,
        "total_workers": len(replicas),
        "available_workers": sum(replica["available"] for replica in replicas),
        "workers": replicas,
    }
    return AsciiJSON(answer)


def _card(service: Service) -> dict[str, object]:
    settings = service.settings
    return {
        "id": settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "jaxchat",
        "max_model_len": service.max_length,
        "default_sampling_params": {
            "temperature": settings.temperature,
            "top_k": settings.top_k,
        },
    }
