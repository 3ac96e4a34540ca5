"""Bodies that aren't JSON: received piece by piece, hashed, and never more of them than is allowed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from post_server.storage.blob_store import BlobStore

_FLUSH = 4 * 2**20


def raw_body(media_type: str, description: str) -> dict[str, Any]:
    """The OpenAPI description of a body of plain bytes."""
    schema = {"type": "string", "format": "binary"}
    content = {media_type: {"schema": schema}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


@asynccontextmanager
async def received_file(request: Request, store: BlobStore) -> AsyncIterator[Path]:
    """The body in a temporary file, which is gone afterwards unless the store adopted it."""
    path = await run_in_threadpool(store.new_file)
    try:
        waiting = bytearray()
        async for chunk in request.stream():
            waiting += chunk
            if len(waiting) >= _FLUSH:
                await run_in_threadpool(_append, path, bytes(waiting))
                waiting.clear()
        await run_in_threadpool(_append, path, bytes(waiting))
        yield path
    finally:
        path.unlink(missing_ok=True)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(data)
