"""Structured logs of a process: JSON lines for machines, colours for people, never a text or a tensor."""

from __future__ import annotations

import logging
import sys
import traceback

import structlog

from post_server.settings import Settings


def configure_logs(settings: Settings) -> None:
    """Send structlog's and the libraries' logs to standard error in one form."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _say_where,
    ]
    if settings.log_json:
        last: list[structlog.typing.Processor] = [
            structlog.processors.JSONRenderer(),
        ]
    else:
        last = [structlog.dev.ConsoleRenderer()]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logger = logging.getLogger("post")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(settings.log_level.upper())


def _say_where(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """In the place of a traceback with its message: the message of any error, a library's too, may quote a text."""
    given = line.pop("exc_info", None)
    error = given if isinstance(given, BaseException) else given[1] if isinstance(given, tuple) else sys.exc_info()[1]
    if given and error is not None:
        line["error"], line["where"] = type(error).__name__, where(error)
    return line


def where(error: BaseException) -> str:
    """The traceback of an error and its causes by place and class. Messages are left out: they may quote a text."""
    parts: list[str] = []
    at: BaseException | None = error
    while at is not None and len(parts) < 10:
        parts.append("".join(traceback.format_tb(at.__traceback__)) + type(at).__name__)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return "\nfollowed by\n".join(reversed(parts))
