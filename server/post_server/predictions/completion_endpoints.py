"""``/v1/completions``: a target model generates text, in the shape of OpenAI's API."""

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
from post_server.http.dependencies import App, Context, PredictCaller
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
async def create_completion(body: CompletionCreate, request: Request, app: App, caller: PredictCaller) -> Any:
    """Generate text, in the shape of OpenAI's API: `model` is `<target model>:<soft prompt>`.

    The provider sees the texts. Log-probabilities need a key with the scope `scores`.
    """
    question = await run_in_threadpool(_resolve, app, caller, body)
    payload, seconds = question.model_dump(mode="json"), app.settings.prediction_seconds
    metadata = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    is_gone = request.is_disconnected
    if not body.stream:
        result = await queue_client.request(payload, seconds, settings=app.settings, kind="completion", is_gone=is_gone)
        return Completion.model_validate(metadata | result)
    replies = queue_client.replies(payload, seconds, settings=app.settings, kind="completion", is_gone=is_gone)
    first = await anext(replies)  # a refusal is a problem, not a stream
    events = _events(metadata, first, replies, body)
    return EventSourceResponse(events, ping=_PING_SECONDS, headers={"Cache-Control": "no-store"})


async def _events(
    metadata: dict[str, Any],
    first: dict[str, Any],
    replies: AsyncGenerator[dict[str, Any]],
    body: CompletionCreate,
) -> AsyncGenerator[ServerSentEvent]:
    """One event per part. When the caller disconnects, closing ``replies`` makes the predictor stop."""
    try:
        reply = first
        while "part" in reply:
            yield _event(Completion.model_validate(metadata | reply["part"]))
            reply = await anext(replies)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event(Completion.model_validate(metadata | {"choices": [], "usage": reply["ok"]["usage"]}))
    except PostError as error:
        yield ServerSentEvent(data=json.dumps({"error": error.problem() | {"message": error.detail}}), sep="\n")
        return
    finally:
        await replies.aclose()
    yield ServerSentEvent(data="[DONE]", sep="\n")


def _event(part: Completion) -> ServerSentEvent:
    return ServerSentEvent(data=part.model_dump_json(), sep="\n")


def _resolve(app: Context, caller: ApiKeyRow, body: CompletionCreate) -> queue_client.CompletionQuestion:
    """The request with names replaced by ids, checked against what the caller may use."""
    if body.logprobs is not None:
        check_scope(caller, Scope.SCORES)
    name, colon, prompt_id = body.model.partition(":")
    with app.database.read() as session:
        model = find_model(session, name, ModelRole.TARGET)
        prompt = visible_prompt(session, caller, prompt_id) if colon else None
    if prompt is not None:
        check_prompt_fits(prompt, model)
    return queue_client.CompletionQuestion(model=model.id, prompt=prompt_id if colon else None, form=body)
