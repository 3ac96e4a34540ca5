"""One way to log for every process of the server: JSON lines, or plain lines for people.

Never logged: texts, keys, prompts.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from post_server.settings import Settings

_NOISY = ("celery.worker.strategy", "celery.app.trace", "httpx", "amqp", "kombu")


def quiet_models() -> None:
    """No progress bars of the model libraries in the log of a process that loads models."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def configure_logging(settings: Settings) -> None:
    """Send the standard library's log records (ours and the libraries') to standard error."""
    steps: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if settings.log_json:
        last: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=False)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=steps,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
