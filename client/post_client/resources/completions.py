"""``client.completions``: texts continued by a target model. The provider sees the texts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError

from post_client.http.responses import parse
from post_client.http.session import JSON
from post_client.resources._request_bodies import body
from post_client.resources._sync import AsyncResource, Resource, blocking, iterating
from post_shared.errors import IntegrityError, from_problem
from post_shared.schemas.completions import Completion, CompletionCreate

_PATH = "/v1/completions"
_END = "[DONE]"


class AsyncCompletions(AsyncResource):
    """``client.completions`` of an :class:`post_client.AsyncClient`"""

    async def create(self, /, *, model: str, prompt: str | Sequence[str], **options: Any) -> Completion:
        """Continue one text or several. ``model`` is ``'<target model>:<soft prompt>'``; options are those of
        :class:`post_shared.schemas.completions.CompletionCreate`. Retried when the server is unavailable."""
        texts = prompt if isinstance(prompt, str) else list(prompt)
        content = body(CompletionCreate, model=model, prompt=texts, **options).model_dump_json(exclude_none=True)
        response = await self._http.send("POST", _PATH, content=content.encode(), headers=JSON, idempotent=True)
        return parse(response, Completion)

    async def stream(self, /, *, model: str, prompt: str | Sequence[str], **options: Any) -> AsyncIterator[Completion]:
        """The same, streamed in chunks. A broken stream is not restarted.

        Raises:
            IntegrityError: the stream is incomplete or malformed.
            PostError: a server error after the first chunk, as the class of its code.
        """
        texts = prompt if isinstance(prompt, str) else list(prompt)
        request = body(CompletionCreate, model=model, prompt=texts, stream=True, **options)
        content, headers = request.model_dump_json(exclude_none=True).encode(), JSON | {"Accept": "text/event-stream"}
        async with (
            self._http.stream("POST", _PATH, content=content, headers=headers) as response,
            aclosing(self._http.wire.lines(response)) as lines,  # type: ignore[type-var]
        ):
            async for line in lines:
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == _END:
                    return
                if data:
                    yield _chunk(data)
        raise IntegrityError("the stream ended before the completion did; try again")


def _chunk(data: str) -> Completion:
    try:
        members = json.loads(data)
        if isinstance(members, dict) and isinstance(members.get("error"), dict):
            raise from_problem(members["error"])
        return Completion.model_validate(members, extra="ignore")
    except (ValueError, ValidationError) as error:
        raise IntegrityError("the stream contains something that isn't part of a completion") from error


class Completions(Resource[AsyncCompletions]):
    """``client.completions``"""

    create = blocking(AsyncCompletions.create)
    stream = iterating(AsyncCompletions.stream)
