"""Request bodies that aren't JSON, streamed to a temporary file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from post_server.storage.blob_store import BlobStore

_FLUSH_BYTES = 4 * 2**20


def raw_body(media_type: str, description: str) -> dict[str, Any]:
    """The OpenAPI description of a binary body."""
    schema = {"type": "string", "format": "binary"}
    content = {media_type: {"schema": schema}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


@asynccontextmanager
async def received_file(request: Request, store: BlobStore) -> AsyncIterator[Path]:
    """The body in a temporary file, which is deleted afterwards unless the store adopted it."""
    path = await run_in_threadpool(store.new_file)
    try:
        buffer = bytearray()
        async for chunk in request.stream():
            buffer += chunk
            if len(buffer) >= _FLUSH_BYTES:
                await run_in_threadpool(_append, path, bytes(buffer))
                buffer.clear()
        await run_in_threadpool(_append, path, bytes(buffer))
        yield path
    finally:
        path.unlink(missing_ok=True)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(data)
