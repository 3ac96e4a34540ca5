"""``/v1/prompts``: source prompts pushed by owners, and target prompts made by transfers."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from post_server.auth.audit_log import record
from post_server.db.tables import ApiKeyRow, PromptRow
from post_server.http.dependencies import App, Caller, Context, TransferCaller
from post_server.http.idempotency import IdempotencyKey, Once
from post_server.http.pagination import Paging, paginate
from post_server.http.problems import problems
from post_server.http.range_requests import DownloadRequest, Part, downloads, note_download, serve
from post_server.http.raw_body import raw_body
from post_server.http.routing import Route
from post_server.prompts.service import add_prompt, delete_prompt, prompt_document, visible_prompt
from post_shared.errors import Forbidden
from post_shared.schemas.common import Page, Role
from post_shared.schemas.prompts import Prompt, PromptRole

router = APIRouter(route_class=Route, prefix="/v1/prompts", tags=["prompts"])

PromptId = Annotated[str, Path(min_length=1, max_length=64)]


@router.get("", responses=problems())
def list_prompts(app: App, caller: Caller, paging: Paging, role: PromptRole | None = None) -> Page[Prompt]:
    """The caller's prompts (for a provider, all prompts), newest first."""
    statement = select(PromptRow)
    if caller.role is not Role.PROVIDER:
        statement = statement.where(PromptRow.owner_key_id == caller.id)
    if role is not None:
        statement = statement.where(PromptRow.role == role)
    with app.database.read() as session:
        return paginate(session, statement, PromptRow, paging, prompt_document)


@router.get("/{prompt}", responses=problems(404))
def get_prompt(app: App, caller: Caller, prompt: PromptId) -> Prompt:
    """One prompt."""
    with app.database.read() as session:
        return prompt_document(visible_prompt(session, caller, prompt))


@router.head("/{prompt}/file", include_in_schema=False)
@router.get("/{prompt}/file", response_class=StreamingResponse, responses=downloads(403, 404))
async def get_prompt_file(app: App, caller: Caller, prompt: PromptId, part: Part) -> Response:
    """The prompt file. Target prompts belong to the target model, so only the provider can download those."""
    row = await run_in_threadpool(_readable_prompt, app, caller, prompt, part)
    return await serve(app.store, row.sha256, row.size_bytes, part)


@router.post(
    "",
    status_code=201,
    response_model=Prompt,
    responses=problems(409, 413) | {200: {"model": Prompt, "description": "It already existed"}},
    openapi_extra=raw_body("application/octet-stream", "A prompt file."),
)
async def create_prompt(
    request: Request, app: App, caller: TransferCaller, idempotency_key: IdempotencyKey = None
) -> Response:
    """Push a source prompt. Its bytes are checked before anything is stored."""
    once = Once(app, caller, idempotency_key)
    with once.in_flight():
        data = await request.body()
        return await run_in_threadpool(_create, once, data)


@router.delete("/{prompt}", status_code=204, responses=problems(404, 409))
def remove_prompt(app: App, caller: TransferCaller, prompt: PromptId) -> None:
    """Delete a prompt and its bytes. Target prompts made from it stay until they are deleted too."""
    with app.database.write() as session:
        delete_prompt(session, app.store, visible_prompt(session, caller, prompt))
        record(session, caller.id, "prompt.delete", prompt)


def _readable_prompt(app: Context, caller: ApiKeyRow, prompt: str, part: DownloadRequest) -> PromptRow:
    with app.database.read() as session:
        row = visible_prompt(session, caller, prompt)
    if row.role is PromptRole.TARGET and caller.role is not Role.PROVIDER:
        raise Forbidden("A target prompt belongs to the target model and stays with the provider; ask for predictions.")
    note_download(app, caller, part, "prompt.download", row.id)
    return row


def _create(once: Once, data: bytes) -> Response:
    def create(session: Session) -> tuple[int, Prompt]:
        row, is_new = add_prompt(
            session,
            once.app.store,
            data,
            role=PromptRole.SOURCE,
            owner_key_id=once.caller.id,
            max_bytes=once.app.settings.prompt_bytes,
        )
        if is_new:
            record(session, once.caller.id, "prompt.push", row.id)
        return 201 if is_new else 200, prompt_document(row)

    return once.run("prompt", hashlib.sha256(data).hexdigest(), create)
