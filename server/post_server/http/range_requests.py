"""Downloads: one blob, whole or in part, by the rules of RFC 9110. Its ETag is its SHA-256, so it never lies."""

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
class Wanted:
    """What a request asks for of a blob."""

    head: bool
    range: str | None
    if_range: str | None
    if_none_match: str | None


async def _wanted(
    request: Request,
    range_: Annotated[str | None, Header(alias="Range", max_length=100)] = None,
    if_range: Annotated[str | None, Header(max_length=100)] = None,
    if_none_match: Annotated[str | None, Header(max_length=1000)] = None,
) -> Wanted:
    return Wanted(request.method == "HEAD", range_, if_range, if_none_match)


Part = Annotated[Wanted, Depends(_wanted)]


def downloads(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of an endpoint that serves a blob, for its OpenAPI document."""
    return problems(416, *statuses) | {
        200: {"description": "The file"} | _BINARY,
        206: {"description": "The part of it that Range asks for"} | _BINARY,
        304: {"description": "The caller has it: If-None-Match names its ETag"},
    }


async def serve(store: BlobStore, sha256: str, size: int, wanted: Wanted) -> Response:
    """The blob, the part of it that is asked for, or word that the caller has it. A HEAD opens nothing.

    Raises:
        RangeInvalid: the range begins behind the end.
        NotFound: the store has lost the blob.
    """
    etag = f'"{sha256}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
    if wanted.if_none_match is not None and _matches(wanted.if_none_match, etag):
        return Response(status_code=304, headers=headers)
    mixed = wanted.head or wanted.if_range not in (None, etag)  # RFC 9110: Range is defined for GET alone
    part = None if wanted.range is None or mixed else byte_range(wanted.range, size)
    start, stop = part or (0, size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    media_type = "application/octet-stream"
    if wanted.head:
        return Response(headers=headers, media_type=media_type)
    chunks = await run_in_threadpool(store.open, sha256, start, stop)
    return StreamingResponse(chunks, status_code=200 if part is None else 206, media_type=media_type, headers=headers)


def note_download(app: Context, caller: ApiKeyRow, wanted: Wanted, action: str, thing: str) -> None:
    """Every request for bytes goes into the audit log, parts too: who asks for two halves has the whole."""
    if not wanted.head:
        with app.database.write() as session:
            record(session, caller.id, action, thing)


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """``(start, stop)`` of a Range header with one range; None when it's no such header, so the whole is served.

    Raises:
        RangeInvalid: it begins behind the end.
    """
    found = _RANGE.fullmatch(header.strip())
    if found is None or found.group(0) == "bytes=-":
        return None
    first, last = found.groups()
    start = max(0, size - int(last)) if first is None else int(first)
    stop = size if first is None or last is None else min(size, int(last) + 1)
    if first is not None and last is not None and int(last) < start:
        return None  # not a range at all, says RFC 9110
    if start >= size or stop <= start:
        raise RangeInvalid(f"The file has {size} bytes.", size=size)
    return start, stop


def _matches(header: str, etag: str) -> bool:
    known = [each.strip().removeprefix("W/") for each in header.split(",")]
    return etag in known or known == ["*"]
