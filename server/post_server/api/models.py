"""``/v1/models``: what there is, and the student's files. A target model's weights never leave."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from post_server.api.context import App, Caller, Context
from post_server.api.pagination import Paging, paginate
from post_server.api.problems import problems
from post_server.model_store import find_model, manifest_document, model_document, model_files
from post_server.records import ModelRow
from post_shared.errors import Forbidden, NotFound, RangeInvalid
from post_shared.schemas import Model, ModelFile, ModelManifest, ModelRole, Page

router = APIRouter(prefix="/v1/models", tags=["models"])

_RANGE = re.compile(r"bytes=(\d{1,19})?-(\d{1,19})?")
_BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
Reference = Annotated[str, Path(min_length=1, max_length=64, description="Id or name.")]


@router.get("", responses=problems())
def list_models(app: App, caller: Caller, paging: Paging, role: ModelRole | None = None) -> Page[Model]:
    """All models, newest first."""
    statement = select(ModelRow) if role is None else select(ModelRow).where(ModelRow.role == role)
    with app.database.read() as session:
        return paginate(session, statement, ModelRow, paging, model_document)


@router.get("/{model}", responses=problems(404))
def get_model(app: App, caller: Caller, model: Reference) -> Model:
    """One model."""
    with app.database.read() as session:
        return model_document(find_model(session, model))


@router.get("/{model}/manifest", responses=problems(404))
def get_manifest(app: App, caller: Caller, model: Reference) -> ModelManifest:
    """Every file of a model with its size and SHA-256."""
    with app.database.read() as session:
        return manifest_document(find_model(session, model))


@router.get(
    "/{model}/files/{path:path}",
    response_class=StreamingResponse,
    responses=problems(403, 404, 416)
    | {
        200: {"description": "The file"} | _BINARY,
        206: {"description": "The part of it that Range asks for"} | _BINARY,
        304: {"description": "The caller has it: If-None-Match names its ETag"},
    },
)
async def get_model_file(
    app: App,
    caller: Caller,
    model: Reference,
    path: Annotated[str, Path(max_length=255)],
    range_: Annotated[str | None, Header(alias="Range", max_length=100)] = None,
    if_range: Annotated[str | None, Header(max_length=100)] = None,
    if_none_match: Annotated[str | None, Header(max_length=1000)] = None,
) -> Response:
    """A student's file, whole or in part; its ETag is its SHA-256."""
    file = await run_in_threadpool(_student_file, app, model, path)
    etag = f'"{file.sha256}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
    if if_none_match is not None and _matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    part = None if range_ is None or if_range not in (None, etag) else byte_range(range_, file.size)
    start, stop = part or (0, file.size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    headers["Content-Length"] = str(stop - start)
    chunks = await run_in_threadpool(app.store.open, file.sha256, start, stop)
    return StreamingResponse(
        chunks, status_code=200 if part is None else 206, media_type="application/octet-stream", headers=headers
    )


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


def _student_file(app: Context, model: str, path: str) -> ModelFile:
    with app.database.read() as session:
        row = find_model(session, model)
    if row.role is not ModelRole.STUDENT:
        raise Forbidden("A target model's files never leave the provider; pull one of its students.")
    for file in model_files(row):
        if file.path == path:
            return file
    raise NotFound(f"The model {row.name} has no such file; its manifest lists all.")
