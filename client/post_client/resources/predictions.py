"""``client.predictions``: predictions of a target model. The provider sees the texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from post_client.http.responses import parse
from post_client.http.session import JSON
from post_client.resources._sync import AsyncResource, Resource, blocking
from post_shared.schemas.predictions import Prediction, PredictionCreate
from post_shared.schemas.predictions import Predictions as PredictionsDocument
from post_shared.schemas.tasks import TaskSpec

MAX_TEXTS = 256


def _ignore(done: int, count: int) -> None: ...


class AsyncPredictions(AsyncResource):
    """``client.predictions`` of an :class:`post_client.AsyncClient`"""

    async def create(
        self,
        *,
        model: str,
        texts: Sequence[str],
        prompt: str | None = None,
        task: TaskSpec | None = None,
        max_new_tokens: int = 16,
        texts_per_request: int = MAX_TEXTS,
        progress: Callable[[int, int], None] = _ignore,
    ) -> list[Prediction]:
        """One prediction per text, in order. With a ``task`` and no ``prompt``: zero-shot."""
        predictions: list[Prediction] = []
        size = max(1, min(texts_per_request, MAX_TEXTS))
        for start in range(0, len(texts), size):
            body = PredictionCreate.model_construct(
                model=model,
                prompt=prompt,
                task=task,
                texts=list(texts[start : start + size]),
                max_new_tokens=max_new_tokens,
            )
            predictions += (await self._send(body)).items
            progress(len(predictions), len(texts))
        return predictions

    async def _send(self, body: PredictionCreate) -> PredictionsDocument:
        """A prediction changes nothing at the provider, so the request is idempotent."""
        content = body.model_dump_json(exclude_none=True).encode()
        response = await self._http.send("POST", "/v1/predictions", content=content, headers=JSON, idempotent=True)
        return parse(response, PredictionsDocument)


class Predictions(Resource[AsyncPredictions]):
    """``client.predictions``"""

    create = blocking(AsyncPredictions.create)
