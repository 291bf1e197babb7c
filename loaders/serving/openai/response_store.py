"""Earlier responses, which clients continue, read or delete."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import ApiError

MOST_RESPONSES = 1000
MOST_CHARACTERS = 32 << 20

_Messages = Sequence[dict[str, Any]]


class _Kept(NamedTuple):
    messages: _Messages
    body: bytes
    size: int


class ResponseStore:
    """Recent responses, with the messages before them. Only the event loop's thread may use it.

    Args:
        most_responses: maximum number of responses; the least recently used is forgotten first.
        most_characters: maximum number of characters in the JSON of all of them and of their messages.
    """

    def __init__(self, most_responses: int = MOST_RESPONSES, most_characters: int = MOST_CHARACTERS) -> None:
        self._most_responses, self._most_characters = most_responses, most_characters
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._characters = 0

    def messages(self, identifier: str) -> _Messages:
        """Return the messages of a response and of those before it.

        Raises:
            ApiError: the response is unknown, or was forgotten.
        """
        if identifier not in self._kept:
            raise ApiError(
                404,
                f"Previous response {identifier!r:.100} not found; send the whole conversation as input.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._kept.move_to_end(identifier)
        return self._kept[identifier].messages

    def body(self, identifier: str) -> bytes:
        """Return the JSON of a response.

        Raises:
            ApiError: the response is unknown, or was forgotten.
        """
        self._check(identifier)
        self._kept.move_to_end(identifier)
        return self._kept[identifier].body

    def remove(self, identifier: str) -> None:
        """Forget a response; error as for `body`."""
        self._check(identifier)
        self._characters -= self._kept.pop(identifier).size

    def _check(self, identifier: str) -> None:
        if identifier not in self._kept:
            text = f"Response {identifier!r:.100} not found; it was not stored, or was deleted or forgotten."
            raise ApiError(404, text, param="response_id", code="response_not_found")

    def add(self, identifier: str, messages: _Messages, body: bytes) -> None:
        """Keep a response, and forget others as far as the limits require.

        Args:
            identifier: the response's identifier.
            messages: the messages of the response and of those before it.
            body: the JSON of the response.
        """
        size = len(json.dumps(messages)) + len(body)
        self._kept[identifier] = _Kept(messages, body, size)
        self._characters += size
        while len(self._kept) > self._most_responses or self._characters > self._most_characters:
            self._characters -= self._kept.popitem(last=False)[1].size
