"""``/v1/completions``: a target model goes on with texts, in the shape of OpenAI's API."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from post_server.auth.keys import check_scope
from post_server.db.tables import ApiKeyRow
from post_server.http.dependencies import App, Asker, Context
from post_server.http.problems import OPENAI_PATH, problems
from post_server.http.routing import Route
from post_server.models.service import find_model
from post_server.predictions import queue_client
from post_server.prompts.service import check_prompt_fits, visible_prompt
from post_shared.errors import PostError
from post_shared.schemas.completions import Completion, CompletionCreate
from post_shared.schemas.keys import Scope
from post_shared.schemas.models import ModelRole

router = APIRouter(route_class=Route, prefix=OPENAI_PATH, tags=["predictions"])

_PING_SECONDS = 15
_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


@router.post(
    "",
    response_model=Completion,
    responses=problems(404, 413, 429, 503, 504)
    | {200: {"description": "A completion, or with `stream` events that end with `[DONE]`"} | _STREAM},
)
async def create_completion(form: CompletionCreate, request: Request, app: App, caller: Asker) -> Any:
    """Go on with texts, in the shape of OpenAI's API: `model` is `<target model>:<soft prompt>`.

    The provider sees the texts. Log-probabilities come to keys with the scope `scores`.
    """
    question = await run_in_threadpool(_resolve, app, caller, form)
    payload, seconds = question.model_dump(mode="json"), app.settings.prediction_seconds
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": form.model}
    left = request.is_disconnected
    if not form.stream:
        found = await queue_client.request(payload, seconds, settings=app.settings, kind="completion", left=left)
        return Completion.model_validate(head | found)
    replies = queue_client.replies(payload, seconds, settings=app.settings, kind="completion", left=left)
    first = await anext(replies)  # a refusal is a problem, not a stream
    events = _events(head, first, replies, form)
    return EventSourceResponse(events, ping=_PING_SECONDS, headers={"Cache-Control": "no-store"})


async def _events(
    head: dict[str, Any],
    first: dict[str, Any],
    replies: AsyncGenerator[dict[str, Any]],
    form: CompletionCreate,
) -> AsyncGenerator[ServerSentEvent]:
    """Every piece as it comes. When the caller goes away, leaving ``replies`` makes the predictor stop."""
    try:
        reply = first
        while "part" in reply:
            yield _event(Completion.model_validate(head | reply["part"]))
            reply = await anext(replies)
        if form.stream_options is not None and form.stream_options.include_usage:
            yield _event(Completion.model_validate(head | {"choices": [], "usage": reply["ok"]["usage"]}))
    except PostError as error:
        yield ServerSentEvent(data=json.dumps({"error": error.problem() | {"message": error.detail}}), sep="\n")
        return
    finally:
        await replies.aclose()
    yield ServerSentEvent(data="[DONE]", sep="\n")


def _event(piece: Completion) -> ServerSentEvent:
    return ServerSentEvent(data=piece.model_dump_json(), sep="\n")


def _resolve(app: Context, caller: ApiKeyRow, form: CompletionCreate) -> queue_client.CompletionQuestion:
    """The question with ids for names, checked against what the caller may use."""
    if form.logprobs is not None:
        check_scope(caller, Scope.SCORES)
    name, colon, prompt_id = form.model.partition(":")
    with app.database.read() as session:
        model = find_model(session, name, ModelRole.TARGET)
        prompt = visible_prompt(session, caller, prompt_id) if colon else None
    if prompt is not None:
        check_prompt_fits(prompt, model)
    return queue_client.CompletionQuestion(model=model.id, prompt=prompt_id if colon else None, form=form)
