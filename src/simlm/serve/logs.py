"""Logs as one JSON object a line. What people searched for is not in them, unless that is asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any


class JsonLines(logging.Formatter):
    """time (UTC), level, logger, event; the fields of `extra={"fields": {...}}`; error with the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        fields = record.__dict__.get("fields")
        if isinstance(fields, dict):
            line |= fields
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_json_lines(level: str) -> None:
    """Send all logs to standard error as JSON lines; standard output stays free for protocols that use it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("simlm", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    # Its lines say what ours say, with the address of the documentation added.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


__all__ = ["JsonLines", "log_json_lines"]
