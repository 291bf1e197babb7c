"""The settings of a server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifact.frozen import Frozen

MIB = 1 << 20


class ServeSettings(Frozen):
    """The settings of a server.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 lets the system choose.
        api_keys: accepted keys, one of which every request must contain; empty if requests need no key.
        cors_origins: origins whose web pages may read answers; "*" for all.
        max_queue: maximum number of answers per model that wait for a slot.
        max_tokens: maximum number of tokens in an answer; None for no limit besides the context.
        max_body: maximum size of a request's body, in bytes.
        request_timeout: seconds from a request's arrival to the end of its answer.
        drain_timeout: seconds that answers in progress may take after SIGTERM.
        idle_unload: seconds without requests after which a model is unloaded; None to keep it.
        memory: maximum number of bytes that loaded models may take together; None for no limit.
        literal: encode messages as plain text, so that special tokens spelt in them cannot forge a turn.
        answer_format: model family whose tool-call syntax to expect; None to let the chat template decide.
        loading: arguments of `load`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[bytes, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 64
    max_tokens: int | None = None
    max_body: int = 4 * MIB
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    idle_unload: float | None = None
    memory: int | None = None
    literal: bool = True
    answer_format: str | None = None
    loading: Mapping[str, Any] | None = None

    @property
    def signature(self) -> Path | None:
        """File of the public key that artifacts must be signed with; None if signatures are optional."""
        key: Path | None = (self.loading or {}).get("require_signature")
        return key
