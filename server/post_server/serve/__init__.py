"""``post serve``: all of the provider's side on one machine. See :func:`main`."""

from __future__ import annotations

from post_server.serve.supervisor import main

__all__ = ["main"]
