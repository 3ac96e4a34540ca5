"""Predictions: the transport that the API process uses, and the process that answers. See :func:`main`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that what needs one small part of this package gets no more
    from post_server.settings import Settings


def main(settings: Settings) -> int:
    """Answer predictions until a signal comes; the exit status."""
    from post_server.predictor.server import main as serve

    return serve(settings)
