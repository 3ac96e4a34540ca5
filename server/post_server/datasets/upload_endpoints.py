"""``/v1/uploads``: a large dataset in parts, each of which can be sent again when it is lost on the way."""

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
    LIFE,
    add_part,
    begin_upload,
    check_whole,
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
from post_server.storage.blob_references import sent_ahead
from post_shared.errors import NotFound
from post_shared.files.model_folder import sha256_of
from post_shared.schemas.common import Page
from post_shared.schemas.datasets import Dataset
from post_shared.schemas.uploads import MAX_PARTS, Upload, UploadCreate, UploadFinish

router = APIRouter(route_class=Route, prefix="/v1/uploads", tags=["datasets"])

UploadId = Annotated[str, Path(min_length=1, max_length=64)]
PartNumber = Annotated[int, Path(ge=1, le=MAX_PARTS)]
UNCHECKED = UploadFinish(sha256=None)
"""What a request without a body asks for."""


@router.get("", responses=problems(403))
def list_uploads(app: App, caller: ProviderReader, paging: Paging) -> Page[Upload]:
    """The caller's own uploads that aren't finished, newest first (provider)."""
    mine = select(UploadRow).where(UploadRow.owner_key_id == caller.id, UploadRow.created_at >= now() - LIFE)
    with app.database.read() as session:
        return paginate(session, mine, UploadRow, paging, lambda row: upload_document(row, app.settings))


@router.post("", status_code=201, response_model=Upload, responses=problems(403, 409, 413))
def create_upload(order: UploadCreate, app: App, caller: Provider, idempotency_key: IdempotencyKey = None) -> Response:
    """Begin to upload a dataset in parts (provider)."""
    once = Once(app, caller, idempotency_key)

    def create(session: Session) -> tuple[int, Upload]:
        return 201, upload_document(begin_upload(session, app.store, caller, order), app.settings)

    with once.in_flight():
        return once.run("upload", document_hash(order), create)


@router.get("/{upload}", responses=problems(403, 404))
def get_upload(app: App, caller: ProviderReader, upload: UploadId) -> Upload:
    """What has come so far (provider)."""
    with app.database.read() as session:
        return upload_document(visible_upload(session, caller, upload), app.settings)


@router.put(
    "/{upload}/parts/{number}",
    responses=problems(403, 404, 413),
    openapi_extra=raw_body("application/octet-stream", "The bytes of the part."),
)
async def put_upload_part(request: Request, app: App, caller: Provider, upload: UploadId, number: PartNumber) -> Upload:
    """Send one part, in any order; sent again, it replaces what was there (provider)."""
    await run_in_threadpool(_look, app, caller, upload)  # before the body is read
    async with received_file(request, app.store) as path:
        return await run_in_threadpool(_put, app, caller, upload, number, path)


@router.post(
    "/{upload}/finish",
    status_code=201,
    response_model=Dataset,
    responses=problems(403, 404, 409, 413) | {200: {"model": Dataset, "description": "It was there already"}},
)
def finish_upload(
    app: App,
    caller: Provider,
    upload: UploadId,
    order: UploadFinish = UNCHECKED,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Make the dataset of all parts (provider). Every line is checked first; with a mistake the upload stays."""
    once = Once(app, caller, idempotency_key)
    what, body = f"finish {upload}", document_hash(order)
    with once.in_flight():
        if (known := once.known(what, body)) is not None:
            return known
        try:
            return _finish(once, upload, order)
        except NotFound:  # unless another process has finished it meanwhile
            if (known := once.known(what, body)) is not None:
                return known
            raise


@router.delete("/{upload}", status_code=204, responses=problems(403, 404))
def remove_dataset_upload(app: App, caller: Provider, upload: UploadId) -> None:
    """Give an upload up, with all its parts (provider)."""
    with app.database.write() as session:
        guard(session)
        remove_upload(session, app.store, visible_upload(session, caller, upload))


def _look(app: Context, caller: ApiKeyRow, upload: str) -> UploadRow:
    with app.database.read() as session:
        return visible_upload(session, caller, upload)


def _put(app: Context, caller: ApiKeyRow, upload: str, number: int, path: FilePath) -> Upload:
    sha256 = sha256_of(path)
    with sent_ahead(app.database, app.store, path, sha256), app.database.write() as session:
        guard(session)
        row = visible_upload(session, caller, upload)
        add_part(session, app.store, row, number, path, sha256, app.settings)
        return upload_document(row, app.settings)


def _finish(once: Once, upload: str, order: UploadFinish) -> Response:
    """The slow part, joining and reading, happens before anything is written."""
    app, caller = once.app, once.caller
    seen = _look(app, caller, upload)
    check_whole(seen)
    path = app.store.new_file()
    try:
        join_parts(app.store, seen.parts, order.sha256, path)
        summary = summarise(path, seen.kind)

        def create(session: Session) -> tuple[int, Dataset]:
            row, is_new = add_dataset(
                session, app.store, path, summary, name=seen.name, kind=seen.kind, licence=seen.licence
            )
            if is_new:
                record(session, caller.id, "dataset.add", row.id)
            remove_upload(session, app.store, visible_upload(session, caller, upload))
            return 201 if is_new else 200, dataset_document(row)

        with sent_ahead(app.database, app.store, path, summary.sha256):
            return once.run(f"finish {upload}", document_hash(order), create)
    finally:
        path.unlink(missing_ok=True)
