"""``/v1/datasets``: the provider's public datasets."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from post_server.auth.audit_log import record
from post_server.datasets.service import add_dataset, dataset_document, find_dataset, first_rows, summarise
from post_server.db.tables import DatasetRow
from post_server.http.dependencies import App, Caller, Context, Provider
from post_server.http.idempotency import IdempotencyKey, Once
from post_server.http.pagination import Paging, paginate
from post_server.http.problems import problems
from post_server.http.raw_body import raw_body, received_file
from post_server.http.routing import Route
from post_server.storage.blob_references import uploaded_early
from post_shared.schemas.common import Name, Page
from post_shared.schemas.datasets import Dataset, DatasetKind, DatasetPreview
from post_shared.schemas.uploads import LicenceName

router = APIRouter(route_class=Route, prefix="/v1/datasets", tags=["datasets"])

DatasetReference = Annotated[str, Path(min_length=1, max_length=64, description="Id or name.")]


@router.get("", responses=problems())
def list_datasets(app: App, caller: Caller, paging: Paging) -> Page[Dataset]:
    """All public datasets, newest first."""
    with app.database.read() as session:
        return paginate(session, select(DatasetRow), DatasetRow, paging, dataset_document)


@router.get("/{dataset}", responses=problems(404))
def get_dataset(app: App, caller: Caller, dataset: DatasetReference) -> Dataset:
    """One dataset."""
    with app.database.read() as session:
        return dataset_document(find_dataset(session, dataset))


@router.get("/{dataset}/preview", responses=problems(404))
async def get_dataset_preview(
    app: App,
    caller: Caller,
    dataset: DatasetReference,
    rows: Annotated[int, Query(ge=1, le=100, description="Maximum number of rows.")] = 10,
) -> DatasetPreview:
    """The first rows of a dataset; long texts are truncated."""
    return await run_in_threadpool(_preview, app, dataset, rows)


def _preview(app: Context, dataset: str, rows: int) -> DatasetPreview:
    with app.database.read() as session:
        row = find_dataset(session, dataset)
    return DatasetPreview(dataset_id=row.id, items=first_rows(app.store, row, rows))


@router.post(
    "",
    status_code=201,
    response_model=Dataset,
    responses=problems(403, 409, 413) | {200: {"model": Dataset, "description": "It already existed"}},
    openapi_extra=raw_body("application/octet-stream", "JSON Lines for `rows`, plain text for `corpus`; UTF-8."),
)
async def create_dataset(
    request: Request,
    app: App,
    caller: Provider,
    name: Annotated[Name, Query()],
    kind: DatasetKind,
    licence: Annotated[LicenceName | None, Query()] = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Upload public data (provider). All lines are checked first; nothing of an invalid file is stored."""
    once = Once(app, caller, idempotency_key)
    with once.in_flight():
        async with received_file(request, app.store) as path:
            return await run_in_threadpool(_create, once, path, name, kind, licence)


def _create(once: Once, path: FilePath, name: str, kind: DatasetKind, licence: str | None) -> Response:
    summary = summarise(path, kind)

    def create(session: Session) -> tuple[int, Dataset]:
        row, is_new = add_dataset(session, once.app.store, path, summary, name=name, kind=kind, licence=licence)
        if is_new:
            record(session, once.caller.id, "dataset.add", row.id)
        return 201 if is_new else 200, dataset_document(row)

    with uploaded_early(once.app.database, once.app.store, path, summary.sha256):
        return once.run(f"dataset {name} {kind} {licence}", summary.sha256, create)
