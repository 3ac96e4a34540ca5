"""``/v1/predictions``: predictions of a target model, made by a predictor process."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from post_server.auth.keys import scopes_of
from post_server.db.tables import ApiKeyRow
from post_server.http.dependencies import App, Context, PredictCaller
from post_server.http.problems import problems
from post_server.http.routing import Route
from post_server.models.service import find_model
from post_server.predictions import queue_client
from post_server.prompts.service import check_prompt_fits, check_task, visible_prompt
from post_shared.schemas.keys import Scope
from post_shared.schemas.models import ModelRole
from post_shared.schemas.predictions import PredictionCreate, Predictions

router = APIRouter(route_class=Route, prefix="/v1/predictions", tags=["predictions"])


@router.post("", responses=problems(404, 413, 503, 504))
async def create_predictions(body: PredictionCreate, request: Request, app: App, caller: PredictCaller) -> Predictions:
    """Predictions of a target model for up to 256 texts, in their order. The provider sees the texts.

    Probabilities are returned to keys with the scope `scores`.
    """
    resolved = await run_in_threadpool(_resolve, app, caller, body)
    answer = await queue_client.request(
        resolved.model_dump(mode="json"),
        app.settings.prediction_seconds,
        settings=app.settings,
        is_gone=request.is_disconnected,
    )
    predictions = Predictions.model_validate(answer)
    if Scope.SCORES not in scopes_of(caller):
        for item in predictions.items:
            item.scores = {}
    return predictions


def _resolve(app: Context, caller: ApiKeyRow, body: PredictionCreate) -> PredictionCreate:
    """The request with names replaced by ids, checked against what the caller may use."""
    with app.database.read() as session:
        model = find_model(session, body.model, ModelRole.TARGET)
        prompt = None if body.prompt is None else visible_prompt(session, caller, body.prompt)
    check_task(prompt, body.task)
    if prompt is not None:
        check_prompt_fits(prompt, model)
    return body.model_copy(update={"model": model.id})
