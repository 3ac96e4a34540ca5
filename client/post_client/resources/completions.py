"""Texts that a target model goes on with. The provider sees the texts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError

from post_client.http.responses import parse
from post_client.http.session import JSON
from post_client.resources._request_bodies import body
from post_client.resources._sync import AsyncNoun, Noun, blocking, iterating
from post_shared.errors import IntegrityError, from_problem
from post_shared.schemas.completions import Completion, CompletionCreate

_PATH = "/v1/completions"
_END = "[DONE]"


class AsyncCompletions(AsyncNoun):
    """``client.completions`` of an :class:`post_client.AsyncClient`"""

    async def create(self, /, *, model: str, prompt: str | Sequence[str], **options: Any) -> Completion:
        """Go on with one text or several; ``model`` is ``'<target model>:<soft prompt>'``. Options as in
        :class:`post_shared.schemas.completions.CompletionCreate`. Asking changes nothing, so it may be repeated."""
        texts = prompt if isinstance(prompt, str) else list(prompt)
        content = body(CompletionCreate, model=model, prompt=texts, **options).model_dump_json(exclude_none=True)
        answer = await self._http.send("POST", _PATH, content=content.encode(), headers=JSON, repeat=True)
        return parse(answer, Completion)

    async def stream(self, /, *, model: str, prompt: str | Sequence[str], **options: Any) -> AsyncIterator[Completion]:
        """The same piece by piece. What broke off is not begun again.

        Raises:
            PostError: what went wrong at the server after the first piece, as the class of its code.
        """
        texts = prompt if isinstance(prompt, str) else list(prompt)
        form = body(CompletionCreate, model=model, prompt=texts, stream=True, **options)
        content, headers = form.model_dump_json(exclude_none=True).encode(), JSON | {"Accept": "text/event-stream"}
        async with (
            self._http.stream("POST", _PATH, content=content, headers=headers) as answer,
            aclosing(self._http.wire.lines(answer)) as lines,  # type: ignore[type-var]
        ):
            async for line in lines:
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == _END:
                    return
                if data:
                    yield _piece(data)
        raise IntegrityError("the stream ended before the completion did; ask again")


def _piece(data: str) -> Completion:
    try:
        members = json.loads(data)
        if isinstance(members, dict) and isinstance(members.get("error"), dict):
            raise from_problem(members["error"])
        return Completion.model_validate(members, extra="ignore")
    except (ValueError, ValidationError) as error:
        raise IntegrityError("the stream has something in it that is no piece of a completion") from error


class Completions(Noun[AsyncCompletions]):
    """``client.completions``"""

    create = blocking(AsyncCompletions.create)
    stream = iterating(AsyncCompletions.stream)
