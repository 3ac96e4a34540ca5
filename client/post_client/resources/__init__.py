"""One module per resource of the API. Methods take keyword arguments only and never print."""

from __future__ import annotations
