"""Structured logs: one JSON object per line on standard error."""

import json
import logging
import sys
import time
from contextlib import suppress
from typing import Any, TextIO


class Log:
    """A log of JSON lines. Threads may share it.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def message(self, text: str) -> None:
        """Write a message."""
        self.record(event="message", message=text)

    def record(self, **fields: Any) -> None:
        """Write a record; its time is in UTC."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        line = json.dumps({"time": stamp, **fields}, default=str)
        with suppress(OSError):  # a log that cannot be written must not end an answer
            self._stream.write(line + "\n")
            self._stream.flush()


class LogHandler(logging.Handler):
    """A handler that writes the records of Python's logging, such as uvicorn's, to a log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record. Of an exception, write only its `repr`, without the traceback."""
        fields: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = repr(record.exc_info[1])
        self._log.record(event="message", level=record.levelname.lower(), **fields)
