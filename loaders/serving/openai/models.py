"""``/v1/models``, in a form that clients of OpenAI's and of Anthropic's API understand."""

from datetime import UTC, datetime
from typing import Any

from ..answers import Services
from ..pool import Entry
from ..requests import Reply, Request, json_reply


async def list_models(services: Services, request: Request, body: bytes) -> Reply:
    """List the models."""
    data = [_model(entry) for entry in services.pool.entries.values()]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return json_reply({"object": "list", "data": data, "has_more": False, **ends})


async def show_model(services: Services, request: Request, body: bytes) -> Reply:
    """Show a model."""
    return json_reply(_model(services.pool.entry(request.path_params["model"])))


def _model(entry: Entry) -> dict[str, Any]:
    created = datetime.fromtimestamp(entry.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    found = {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "precast",
        "type": "model",
        "display_name": entry.name,
        "created_at": created,
        "loaded": entry.model is not None,
    }
    return found if entry.model is None else found | {"max_model_len": entry.model.engine.context}
