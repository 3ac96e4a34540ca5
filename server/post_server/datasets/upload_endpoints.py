"""``/v1/uploads``: uploads of a large dataset in parts, each of which can be retried."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from post_server.auth.audit_log import record
from post_server.datasets.service import add_dataset, dataset_document, summarise
from post_server.datasets.uploads import (
    LIFETIME,
    add_part,
    begin_upload,
    check_complete,
    join_parts,
    remove_upload,
    upload_document,
    visible_upload,
)
from post_server.db.database import guard
from post_server.db.tables import ApiKeyRow, UploadRow, now
from post_server.http.dependencies import App, Context, Provider, ProviderReader
from post_server.http.idempotency import IdempotencyKey, Once, document_hash
from post_server.http.pagination import Paging, paginate
from post_server.http.problems import problems
from post_server.http.raw_body import raw_body, received_file
from post_server.http.routing import Route
from post_server.storage.blob_references import uploaded_early
from post_shared.errors import NotFound
from post_shared.files.model_folder import sha256_of
from post_shared.schemas.common import Page
from post_shared.schemas.datasets import Dataset
from post_shared.schemas.uploads import MAX_PARTS, Upload, UploadCreate, UploadFinish

router = APIRouter(route_class=Route, prefix="/v1/uploads", tags=["datasets"])

UploadId = Annotated[str, Path(min_length=1, max_length=64)]
PartNumber = Annotated[int, Path(ge=1, le=MAX_PARTS)]
UNCHECKED = UploadFinish(sha256=None)
"""The default of a request without a body."""


@router.get("", responses=problems(403))
def list_uploads(app: App, caller: ProviderReader, paging: Paging) -> Page[Upload]:
    """The caller's own unfinished uploads, newest first (provider)."""
    mine = select(UploadRow).where(UploadRow.owner_key_id == caller.id, UploadRow.created_at >= now() - LIFETIME)
    with app.database.read() as session:
        return paginate(session, mine, UploadRow, paging, lambda row: upload_document(row, app.settings))


@router.post("", status_code=201, response_model=Upload, responses=problems(403, 409, 413))
def create_upload(
    request: UploadCreate, app: App, caller: Provider, idempotency_key: IdempotencyKey = None
) -> Response:
    """Begin to upload a dataset in parts (provider)."""
    once = Once(app, caller, idempotency_key)

    def create(session: Session) -> tuple[int, Upload]:
        return 201, upload_document(begin_upload(session, app.store, caller, request), app.settings)

    with once.in_flight():
        return once.run("upload", document_hash(request), create)


@router.get("/{upload}", responses=problems(403, 404))
def get_upload(app: App, caller: ProviderReader, upload: UploadId) -> Upload:
    """An unfinished upload and the parts received so far (provider)."""
    with app.database.read() as session:
        return upload_document(visible_upload(session, caller, upload), app.settings)


@router.put(
    "/{upload}/parts/{number}",
    responses=problems(403, 404, 413),
    openapi_extra=raw_body("application/octet-stream", "The bytes of the part."),
)
async def put_upload_part(request: Request, app: App, caller: Provider, upload: UploadId, number: PartNumber) -> Upload:
    """Send one part; parts may come in any order, and a repeated part replaces the first (provider)."""
    await run_in_threadpool(_read_upload, app, caller, upload)  # refuse before the body is read
    async with received_file(request, app.store) as path:
        return await run_in_threadpool(_store_part, app, caller, upload, number, path)


@router.post(
    "/{upload}/finish",
    status_code=201,
    response_model=Dataset,
    responses=problems(403, 404, 409, 413) | {200: {"model": Dataset, "description": "It already existed"}},
)
def finish_upload(
    app: App,
    caller: Provider,
    upload: UploadId,
    request: UploadFinish = UNCHECKED,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Create the dataset from all parts (provider). All lines are checked first; an invalid upload is kept."""
    once = Once(app, caller, idempotency_key)
    what, body = f"finish {upload}", document_hash(request)
    with once.in_flight():
        if (stored := once.stored_response(what, body)) is not None:
            return stored
        try:
            return _finish(once, upload, request)
        except NotFound:  # another process may have finished it meanwhile
            if (stored := once.stored_response(what, body)) is not None:
                return stored
            raise


@router.delete("/{upload}", status_code=204, responses=problems(403, 404))
def remove_dataset_upload(app: App, caller: Provider, upload: UploadId) -> None:
    """Abort an upload and delete its parts (provider)."""
    with app.database.write() as session:
        guard(session)
        remove_upload(session, app.store, visible_upload(session, caller, upload))


def _read_upload(app: Context, caller: ApiKeyRow, upload: str) -> UploadRow:
    with app.database.read() as session:
        return visible_upload(session, caller, upload)


def _store_part(app: Context, caller: ApiKeyRow, upload: str, number: int, path: FilePath) -> Upload:
    sha256 = sha256_of(path)
    with uploaded_early(app.database, app.store, path, sha256), app.database.write() as session:
        guard(session)
        row = visible_upload(session, caller, upload)
        add_part(session, app.store, row, number, path, sha256, app.settings)
        return upload_document(row, app.settings)


def _finish(once: Once, upload: str, request: UploadFinish) -> Response:
    """Joining and checking are slow, so they come before the write transaction."""
    app, caller = once.app, once.caller
    pending = _read_upload(app, caller, upload)
    check_complete(pending)
    path = app.store.new_file()
    try:
        join_parts(app.store, pending.parts, request.sha256, path)
        summary = summarise(path, pending.kind)

        def create(session: Session) -> tuple[int, Dataset]:
            row, is_new = add_dataset(
                session, app.store, path, summary, name=pending.name, kind=pending.kind, licence=pending.licence
            )
            if is_new:
                record(session, caller.id, "dataset.add", row.id)
            remove_upload(session, app.store, visible_upload(session, caller, upload))
            return 201 if is_new else 200, dataset_document(row)

        with uploaded_early(app.database, app.store, path, summary.sha256):
            return once.run(f"finish {upload}", document_hash(request), create)
    finally:
        path.unlink(missing_ok=True)
