"""Soft prompts at the provider: source prompts that you uploaded, target prompts that came from them."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from urllib.parse import quote

from post_client.http.responses import parse
from post_client.outbound import OutboundRequest, check_outbound
from post_client.resources._sync import AsyncNoun, Noun, blocking, iterating
from post_shared.errors import IntegrityError
from post_shared.schemas.prompts import Prompt, PromptRole


class AsyncPrompts(AsyncNoun):
    """``client.prompts`` of an :class:`post_client.AsyncClient`"""

    async def upload(self, request: OutboundRequest) -> Prompt:
        """Send what :func:`post_client.outbound.build_upload` built, and nothing else.

        The same bytes again give the same prompt, so this is repeated when the server is away.
        """
        check_outbound(request)
        answer = await self._http.send(
            request.method, request.path, content=request.body, headers=dict(request.headers), repeat=True
        )
        return parse(answer, Prompt)

    async def get(self, prompt: str) -> Prompt:
        """One prompt, by id."""
        return await self._http.get(f"/v1/prompts/{quote(prompt, safe='')}", Prompt)

    def list(self, *, role: PromptRole | str | None = None) -> AsyncIterator[Prompt]:
        """Your prompts, or those of one role; a provider sees all."""
        return self._http.pages("/v1/prompts", Prompt, role=str(role) if role else None)

    async def file(self, prompt: str) -> bytes:
        """The prompt file. Target prompts belong to the target model: only the provider gets those."""
        about = await self.get(prompt)
        path = f"/v1/prompts/{quote(prompt, safe='')}/file"
        answer = await self._http.send("GET", path, headers={"Accept": "application/octet-stream"}, repeat=True)
        if hashlib.sha256(answer.content).hexdigest() != about.sha256:
            raise IntegrityError(f"the file of prompt {prompt} doesn't match its SHA-256; fetch it again")
        return answer.content

    async def delete(self, prompt: str) -> None:
        """Remove a prompt from the server. Removing it twice does no harm."""
        await self._http.send("DELETE", f"/v1/prompts/{quote(prompt, safe='')}", repeat=False)


class Prompts(Noun[AsyncPrompts]):
    """``client.prompts``"""

    upload = blocking(AsyncPrompts.upload)
    get = blocking(AsyncPrompts.get)
    list = iterating(AsyncPrompts.list)
    file = blocking(AsyncPrompts.file)
    delete = blocking(AsyncPrompts.delete)
