"""The state of the server: ``/health``, ``/ready`` and ``/metrics``."""

from .answers import Services
from .errors import ApiError
from .metrics import CONTENT_TYPE
from .requests import Reply, Request, json_reply


async def health(services: Services, request: Request, body: bytes) -> Reply:
    """Say that the server is running."""
    return json_reply({"status": "ok"})


async def ready(services: Services, request: Request, body: bytes) -> Reply:
    """Say whether the server can answer: the models loaded at the start must have reproduced their golden answers."""
    if (reason := services.pool.obstacle) is not None:
        raise ApiError(503, reason, code="not_ready", retry_after=1)
    return json_reply({"status": "ready"})


async def metrics(services: Services, request: Request, body: bytes) -> Reply:
    """Show the metrics in Prometheus' text format."""
    return Reply(body=await services.metrics.text(), media_type=CONTENT_TYPE)
