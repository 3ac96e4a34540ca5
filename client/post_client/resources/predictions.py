"""Questions to a target model. The provider sees the texts that are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from post_client.http.responses import parse
from post_client.http.session import JSON
from post_client.resources._sync import AsyncNoun, Noun, blocking
from post_shared.schemas.predictions import Prediction, PredictionCreate
from post_shared.schemas.predictions import Predictions as Answer
from post_shared.schemas.tasks import TaskSpec

MOST_TEXTS = 256


def _ignore(done: int, count: int) -> None: ...


class AsyncPredictions(AsyncNoun):
    """``client.predictions`` of an :class:`post_client.AsyncClient`"""

    async def create(
        self,
        *,
        model: str,
        texts: Sequence[str],
        prompt: str | None = None,
        task: TaskSpec | None = None,
        max_new_tokens: int = 16,
        texts_per_request: int = MOST_TEXTS,
        progress: Callable[[int, int], None] = _ignore,
    ) -> list[Prediction]:
        """One prediction per text, in their order; ``task`` alone asks without a prompt (zero-shot)."""
        found: list[Prediction] = []
        size = max(1, min(texts_per_request, MOST_TEXTS))
        for at in range(0, len(texts), size):
            body = PredictionCreate.model_construct(
                model=model,
                prompt=prompt,
                task=task,
                texts=list(texts[at : at + size]),
                max_new_tokens=max_new_tokens,
            )
            found += (await self._ask(body)).items
            progress(len(found), len(texts))
        return found

    async def _ask(self, body: PredictionCreate) -> Answer:
        """Asking changes nothing at the provider, so it may be repeated."""
        content = body.model_dump_json(exclude_none=True).encode()
        return parse(
            await self._http.send("POST", "/v1/predictions", content=content, headers=JSON, repeat=True), Answer
        )


class Predictions(Noun[AsyncPredictions]):
    """``client.predictions``"""

    create = blocking(AsyncPredictions.create)
