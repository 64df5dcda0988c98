"""A process's log: a line a record, for people or as JSON, with the id of the request that was being answered."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

from deploy.cli.plain import plain
from serving.request_id import request_id

LogFormat = Literal["text", "json"]


def begin_log(form: LogFormat) -> None:
    """Sends what this process logs to stderr."""
    if form == "json":
        # vLLM, which has processes of its own, makes its log by itself.
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(Path(__file__).with_name("vllm_log.json")))
    handler = logging.StreamHandler()
    handler.setFormatter(_FORMATTERS[form]())
    handler.addFilter(_with_request_id)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class PlainFormatter(logging.Formatter):
    """Formats a log's records, each message on one line. Tracebacks keep theirs."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name is logging's)
        """Returns the record's line."""
        record.message = plain(record.message)
        return super().formatMessage(record)


def _text() -> logging.Formatter:
    return PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def _json() -> logging.Formatter:
    """JSON escapes what could forge a line by itself."""
    names = {"levelname": "level", "name": "logger", "exc_info": "traceback"}
    return JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields=names, timestamp="time")


_FORMATTERS = {"text": _text, "json": _json}


def _with_request_id(record: logging.LogRecord) -> bool:
    """Adds the id of the request, if one is being answered. Keeps every record."""
    found = request_id()
    if found:
        record.request_id = found
    return True
