"""JSON Schemas of the server's replies, for its OpenAPI description."""

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]

_TEXT: Fields = {"type": "string"}
_NULL_TEXT: Fields = {"type": ["string", "null"]}
_COUNT: Fields = {"type": "integer", "minimum": 0}
_NUMBER: Fields = {"type": "number"}
_NULL: Fields = {"type": "null"}
_TRUTH: Fields = {"type": "boolean"}
_ANY: Fields = {}


def _object(**fields: Fields) -> Fields:
    """Return the schema of an object with all of the given fields; it may have others."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def _with(schema: Fields, **fields: Fields) -> Fields:
    """Return a schema of an object with further, optional fields."""
    return {**schema, "properties": {**schema["properties"], **fields}}


def _list(item: Fields) -> Fields:
    return {"type": "array", "items": item}


def _nullable(schema: Fields) -> Fields:
    return {"anyOf": [schema, _NULL]}


def _one_of(*values: str) -> Fields:
    return {"enum": list(values)}


_OPENAI_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_NULL_TEXT, code=_NULL_TEXT))
_ANTHROPIC_ERROR = _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT))

_TIMINGS = _object(
    queue_ms=_NUMBER,
    cache_n=_COUNT,
    prompt_n=_COUNT,
    prompt_ms=_NUMBER,
    prompt_per_second=_NUMBER,
    predicted_n=_COUNT,
    predicted_ms=_NUMBER,
    predicted_per_second=_NUMBER,
)
_USAGE = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
)
_FUNCTION = _object(name=_TEXT, arguments=_TEXT)
_CALL = _object(id=_TEXT, type={"const": "function"}, function=_FUNCTION)
_ANSWER = _with(
    _object(role={"const": "assistant"}, content=_NULL_TEXT, refusal=_NULL, annotations=_list(_ANY)),
    reasoning_content=_TEXT,
    tool_calls=_list(_CALL),
)
_TOKEN = _object(token=_TEXT, logprob=_NUMBER, bytes=_list(_COUNT))
_LOGPROBS = _object(
    content=_list({"allOf": [_TOKEN, _object(top_logprobs=_list(_TOKEN))]}),
    refusal=_NULL,
)
_CHAT = _object(
    id=_TEXT,
    object={"const": "chat.completion"},
    created=_COUNT,
    model=_TEXT,
    system_fingerprint=_TEXT,
    choices=_list(
        _object(
            index=_COUNT,
            message=_ANSWER,
            logprobs=_nullable(_LOGPROBS),
            finish_reason=_one_of("stop", "length", "tool_calls"),
        )
    ),
    usage=_USAGE,
    timings=_TIMINGS,
)
_TOP = {"type": "object", "additionalProperties": _NUMBER}
_COMPLETION = _object(
    id=_TEXT,
    object={"const": "text_completion"},
    created=_COUNT,
    model=_TEXT,
    system_fingerprint=_TEXT,
    choices=_list(
        _object(
            index=_COUNT,
            text=_TEXT,
            logprobs=_nullable(
                _object(
                    tokens=_list(_TEXT),
                    token_logprobs=_list(_nullable(_NUMBER)),
                    top_logprobs=_list(_nullable(_TOP)),
                    text_offset=_list(_COUNT),
                )
            ),
            finish_reason=_one_of("stop", "length"),
        )
    ),
    usage=_USAGE,
    timings=_TIMINGS,
)

_ENDED = _one_of("completed", "incomplete")
_OUTPUT_TEXT = _object(
    type={"const": "output_text"}, text=_TEXT, annotations=_list(_ANY), logprobs=_list(_ANY)
)
_ITEM = {
    "oneOf": [
        _object(
            id=_TEXT,
            type={"const": "message"},
            status=_ENDED,
            role={"const": "assistant"},
            content=_list(_OUTPUT_TEXT),
        ),
        _object(
            id=_TEXT,
            type={"const": "reasoning"},
            status=_ENDED,
            summary=_list(_ANY),
            content=_list(_object(type={"const": "reasoning_text"}, text=_TEXT)),
        ),
        _object(
            id=_TEXT,
            type={"const": "function_call"},
            status=_ENDED,
            call_id=_TEXT,
            name=_TEXT,
            arguments=_TEXT,
        ),
    ]
}
_RESPONSE = _object(
    id=_TEXT,
    object={"const": "response"},
    created_at=_COUNT,
    completed_at=_nullable(_COUNT),
    status=_ENDED,
    background={"const": False},
    error=_NULL,
    incomplete_details=_nullable(_object(reason={"const": "max_output_tokens"})),
    instructions=_NULL_TEXT,
    max_output_tokens=_nullable(_COUNT),
    max_tool_calls=_NULL,
    metadata={"type": "object", "additionalProperties": _TEXT},
    model=_TEXT,
    output=_list(_ITEM),
    parallel_tool_calls=_TRUTH,
    previous_response_id=_NULL_TEXT,
    prompt_cache_key=_NULL_TEXT,
    reasoning=_object(effort=_NULL_TEXT, summary=_NULL),
    safety_identifier=_NULL_TEXT,
    service_tier={"const": "default"},
    store=_TRUTH,
    temperature=_NUMBER,
    top_p=_NUMBER,
    presence_penalty=_NUMBER,
    frequency_penalty=_NUMBER,
    text=_object(format=_object(type=_one_of("text", "json_object", "json_schema"))),
    tool_choice={"type": ["string", "object"]},
    tools=_list({"type": "object"}),
    top_logprobs=_COUNT,
    truncation={"const": "disabled"},
    usage=_object(
        input_tokens=_COUNT,
        input_tokens_details=_object(cached_tokens=_COUNT),
        output_tokens=_COUNT,
        output_tokens_details=_object(reasoning_tokens=_COUNT),
        total_tokens=_COUNT,
    ),
    user=_NULL_TEXT,
)

_BLOCK = {
    "oneOf": [
        _object(type={"const": "text"}, text=_TEXT, citations=_NULL),
        _object(type={"const": "thinking"}, thinking=_TEXT, signature=_TEXT),
        _object(
            type={"const": "tool_use"},
            id=_TEXT,
            name=_TEXT,
            input={"type": "object"},
            caller=_object(type={"const": "direct"}),
        ),
    ]
}
_MESSAGE = _object(
    id=_TEXT,
    type={"const": "message"},
    role={"const": "assistant"},
    model=_TEXT,
    content=_list(_BLOCK),
    stop_reason=_one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
    stop_sequence=_NULL_TEXT,
    stop_details=_NULL,
    container=_NULL,
    usage=_object(
        input_tokens=_COUNT,
        cache_creation_input_tokens=_COUNT,
        cache_read_input_tokens=_COUNT,
        cache_creation=_NULL,
        output_tokens=_COUNT,
        output_tokens_details=_object(thinking_tokens=_COUNT),
        server_tool_use=_NULL,
        service_tier={"const": "standard"},
        inference_geo=_NULL,
    ),
)

_MODEL = _with(
    _object(
        id=_TEXT,
        object={"const": "model"},
        created=_COUNT,
        owned_by=_TEXT,
        type={"const": "model"},
        display_name=_TEXT,
        created_at={"type": "string", "format": "date-time"},
        loaded=_TRUTH,
    ),
    max_model_len=_COUNT,
)
_MODELS = _with(
    _object(object={"const": "list"}, data=_list(_MODEL), has_more={"const": False}),
    first_id=_TEXT,
    last_id=_TEXT,
)

ERRORS: Mapping[str, Fields] = {
    "openai_error": _OPENAI_ERROR,
    "anthropic_error": _ANTHROPIC_ERROR,
}
REPLIES: Mapping[str, Fields] = {
    "chat_reply": _CHAT,
    "completion_reply": _COMPLETION,
    "response_reply": _RESPONSE,
    "deletion_reply": _object(id=_TEXT, object={"const": "response"}, deleted={"const": True}),
    "message_reply": _MESSAGE,
    "count_reply": _object(input_tokens=_COUNT),
    "model_reply": _MODEL,
    "models_reply": _MODELS,
    "tokenize_reply": _with(
        _object(tokens=_list(_COUNT), count=_COUNT, max_model_len=_COUNT), token_strs=_list(_NULL_TEXT)
    ),
    "detokenize_reply": _object(prompt=_TEXT),
    "status_reply": _object(status=_TEXT),
    "any_reply": {"type": "object"},
    # Each event of a stream.
    "event": _with(_object(data=_TEXT), event=_TEXT),
}
