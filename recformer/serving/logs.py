"""Log lines as JSON, one a line on stderr."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from recformer.serving.times import now, write_time

LOGGERS = ("recformer.serving", "uvicorn.error")


class JsonLines(logging.Formatter):
    """Time, level, message and what stands in `extra={"fields": …}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as one line."""
        line: dict[str, Any] = {
            "time": write_time(now()),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def write_json_lines(level: str = "INFO") -> None:
    """Let the service and its HTTP server write JSON lines, and nobody else write theirs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
