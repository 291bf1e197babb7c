"""Earlier responses, which later ones continue."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ..errors import ApiError

MOST_RESPONSES = 1000
MOST_CHARACTERS = 32 << 20

_Messages = Sequence[dict[str, Any]]


class ResponseStore:
    """The messages of recent responses. Only the event loop's thread may use it.

    Args:
        most_responses: maximum number of responses; the least recently used is forgotten first.
        most_characters: maximum number of characters in the JSON of all their messages.
    """

    def __init__(self, most_responses: int = MOST_RESPONSES, most_characters: int = MOST_CHARACTERS) -> None:
        self._most_responses, self._most_characters = most_responses, most_characters
        self._kept: OrderedDict[str, tuple[_Messages, int]] = OrderedDict()
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
        return self._kept[identifier][0]

    def add(self, identifier: str, messages: _Messages) -> None:
        """Keep the messages of a response, and forget others as far as the limits require."""
        size = len(json.dumps(messages))
        self._kept[identifier] = messages, size
        self._characters += size
        while len(self._kept) > self._most_responses or self._characters > self._most_characters:
            _, (_, forgotten) = self._kept.popitem(last=False)
            self._characters -= forgotten
