"""The agent's log: a line per event on standard error; JSON, or plain text on a terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

_FIELDS = "virt_sse_fields"


def fields(values: Mapping[str, object]) -> dict[str, object]:
    """The ``extra`` argument of a log call: the fields of the event named by the message."""
    return {_FIELDS: values}


class JsonLines(logging.Formatter):
    """``{"time", "level", "event", …}``; time in UTC, to the millisecond."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        document |= getattr(record, _FIELDS, {})
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


class Readable(logging.Formatter):
    """``virt-sse: LEVEL: EVENT NAME=VALUE …``, for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        words = [f"virt-sse: {record.levelname.lower()}: {record.getMessage()}"]
        words += [f"{name}={value}" for name, value in getattr(record, _FIELDS, {}).items()]
        if record.exc_info:
            words.append("\n" + self.formatException(record.exc_info))
        return " ".join(words)


def set_up() -> None:
    """Log to standard error: virt-sse from level ``INFO``, libraries from ``WARNING``."""
    handler = logging.StreamHandler()
    handler.setFormatter(Readable() if sys.stderr.isatty() else JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("virt_sse").setLevel(logging.INFO)
    logging.getLogger("virt_sse_plugins").setLevel(logging.INFO)
