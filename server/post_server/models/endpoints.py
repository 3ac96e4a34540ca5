"""``/v1/models``: all models, and the files of students. A target model's weights never leave the provider."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from post_server.db.tables import ApiKeyRow, ModelRow
from post_server.http.dependencies import App, Caller, Context
from post_server.http.pagination import Paging, paginate
from post_server.http.problems import problems
from post_server.http.range_requests import DownloadRequest, Part, downloads, note_download, serve
from post_server.http.routing import Route
from post_server.models.service import find_model, manifest_document, model_document, model_files
from post_shared.errors import Forbidden, NotFound
from post_shared.schemas.common import Page
from post_shared.schemas.models import Model, ModelFile, ModelManifest, ModelRole

router = APIRouter(route_class=Route, prefix="/v1/models", tags=["models"])

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
    """All files of a model with their sizes and SHA-256."""
    with app.database.read() as session:
        return manifest_document(find_model(session, model))


@router.head("/{model}/files/{path:path}", include_in_schema=False)
@router.get("/{model}/files/{path:path}", response_class=StreamingResponse, responses=downloads(403, 404))
async def get_model_file(
    app: App, caller: Caller, model: Reference, path: Annotated[str, Path(max_length=255)], part: Part
) -> Response:
    """A file of a student model, whole or in part; its ETag is its SHA-256."""
    file = await run_in_threadpool(_student_file, app, caller, model, path, part)
    return await serve(app.store, file.sha256, file.size, part)


def _student_file(app: Context, caller: ApiKeyRow, model: str, path: str, part: DownloadRequest) -> ModelFile:
    with app.database.read() as session:
        row = find_model(session, model)
    if row.role is not ModelRole.STUDENT:
        raise Forbidden("The files of a target model never leave the provider; pull one of its students.")
    for file in model_files(row):
        if file.path == path:
            note_download(app, caller, part, "model.download", row.id)
            return file
    raise NotFound(f"The model {row.name} has no such file; see its manifest.")
