"""The predictor: the process that answers predictions and completions. See :func:`main`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that importing one small part of this package imports nothing else
    from post_server.settings import Settings


def main(settings: Settings) -> int:
    """Answer predictions until a signal arrives; returns the exit status."""
    from post_server.predictor.server import main as serve

    return serve(settings)
