"""Logging as console text or JSON, for uvicorn's loggers too."""

import logging
import sys
import traceback
from typing import TextIO

import structlog

from bonsai_lora.formats.text import printable

_TRACEBACK = "exc_info"


def configure_logging(level: str, form: str) -> None:
    """Send all logs to standard error, as `console` text or as one `json` object per line."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
    ]
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if form == "json"
        else [
            _escape,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                sort_keys=False,
                pad_event_to=0,
                exception_formatter=_write_traceback,
            ),
        ]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # Its startup and shutdown messages; `serve` logs one line instead.
    # And URLs of what is pulled, which may be signed.
    for name in ("uvicorn.error", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _escape(
    _logger: object, _method: str, line: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Escape control characters in all of a line's texts, whoever logs it."""
    return {
        name: value
        if name == _TRACEBACK
        else printable(value if isinstance(value, str) else repr(value))
        for name, value in line.items()
    }


def _write_traceback(stream: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """Write a traceback; indentation tells its lines from those of the log."""
    text = "".join(traceback.format_exception(*exc_info))
    stream.writelines(f"\n    {printable(line)}" for line in text.splitlines())
