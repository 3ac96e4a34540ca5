"""Downloads of a blob, whole or in part, according to RFC 9110. The ETag is the blob's SHA-256."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from post_server.auth.audit_log import record
from post_server.db.tables import ApiKeyRow
from post_server.http.dependencies import Context
from post_server.http.problems import problems
from post_server.storage.blob_store import BlobStore
from post_shared.errors import RangeInvalid

_RANGE = re.compile(r"bytes=(\d{1,19})?-(\d{1,19})?")
_BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@dataclass(frozen=True)
class DownloadRequest:
    """The parts of a request that select what of a blob is sent."""

    head: bool
    range: str | None
    if_range: str | None
    if_none_match: str | None


async def _download_request(
    request: Request,
    range_: Annotated[str | None, Header(alias="Range", max_length=100)] = None,
    if_range: Annotated[str | None, Header(max_length=100)] = None,
    if_none_match: Annotated[str | None, Header(max_length=1000)] = None,
) -> DownloadRequest:
    return DownloadRequest(request.method == "HEAD", range_, if_range, if_none_match)


Part = Annotated[DownloadRequest, Depends(_download_request)]


def downloads(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The responses of an endpoint that serves a blob, for its OpenAPI document."""
    return problems(416, *statuses) | {
        200: {"description": "The file"} | _BINARY,
        206: {"description": "The requested range"} | _BINARY,
        304: {"description": "Not modified: If-None-Match has the file's ETag"},
    }


async def serve(store: BlobStore, sha256: str, size: int, request: DownloadRequest) -> Response:
    """The blob, the requested range of it, or 304. A HEAD request doesn't open the blob.

    Raises:
        RangeInvalid: the range begins after the end.
        NotFound: the blob is missing from the store.
    """
    etag = f'"{sha256}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
    if request.if_none_match is not None and _matches(request.if_none_match, etag):
        return Response(status_code=304, headers=headers)
    whole = request.head or request.if_range not in (None, etag)  # RFC 9110: Range is only defined for GET
    part = None if request.range is None or whole else byte_range(request.range, size)
    start, stop = part or (0, size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    media_type = "application/octet-stream"
    if request.head:
        return Response(headers=headers, media_type=media_type)
    chunks = await run_in_threadpool(store.open, sha256, start, stop)
    return StreamingResponse(chunks, status_code=200 if part is None else 206, media_type=media_type, headers=headers)


def note_download(app: Context, caller: ApiKeyRow, request: DownloadRequest, action: str, thing: str) -> None:
    """Record every request for bytes in the audit log, partial ones too: two halves are the whole file."""
    if not request.head:
        with app.database.write() as session:
            record(session, caller.id, action, thing)


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """``(start, stop)`` of a Range header with one range; None for any other header, so the whole file is sent.

    Raises:
        RangeInvalid: the range begins after the end.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    start = max(0, size - int(last)) if first is None else int(first)
    stop = size if first is None or last is None else min(size, int(last) + 1)
    if first is not None and last is not None and int(last) < start:
        return None  # an invalid range, which RFC 9110 says to ignore
    if start >= size or stop <= start:
        raise RangeInvalid(f"The file has {size} bytes.", size=size)
    return start, stop


def _matches(header: str, etag: str) -> bool:
    etags = [entry.strip().removeprefix("W/") for entry in header.split(",")]
    return etag in etags or etags == ["*"]
