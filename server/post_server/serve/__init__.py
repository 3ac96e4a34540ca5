"""``post serve``: the whole provider side on one machine. See :func:`main`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that its child processes don't import what only the supervisor needs
    from post_server.settings import Settings


def main(settings: Settings, say: Callable[[str], None] | None = None) -> int:
    """Serve until a signal arrives; returns the exit status. See :func:`post_server.serve.supervisor.main`."""
    from post_server.serve.supervisor import main as serve

    return serve(settings, say)
