"""``client.prompts``: uploaded source prompts, and the target prompts transferred from them."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from urllib.parse import quote

from post_client.http.responses import parse
from post_client.outbound import OutboundRequest, check_outbound
from post_client.resources._sync import AsyncResource, Resource, blocking, iterating
from post_shared.errors import IntegrityError
from post_shared.schemas.prompts import Prompt, PromptRole


class AsyncPrompts(AsyncResource):
    """``client.prompts`` of an :class:`post_client.AsyncClient`"""

    async def upload(self, request: OutboundRequest) -> Prompt:
        """Upload a request built by :func:`post_client.outbound.build_upload`; any other is refused.

        The same bytes give the same prompt, so this is retried when the server is unavailable.

        Raises:
            InvalidInput: the request wasn't built by ``build_upload``.
        """
        check_outbound(request)
        response = await self._http.send(
            request.method, request.path, content=request.body, headers=dict(request.headers), idempotent=True
        )
        return parse(response, Prompt)

    async def get(self, prompt: str) -> Prompt:
        """One prompt, by id."""
        return await self._http.get(f"/v1/prompts/{quote(prompt, safe='')}", Prompt)

    def list(self, *, role: PromptRole | str | None = None) -> AsyncIterator[Prompt]:
        """Your prompts, or those of one role; a provider sees all."""
        return self._http.pages("/v1/prompts", Prompt, role=str(role) if role else None)

    async def file(self, prompt: str) -> bytes:
        """The prompt file. Only the provider can download target prompts.

        Raises:
            IntegrityError: the file doesn't match its SHA-256.
        """
        expected = await self.get(prompt)
        path = f"/v1/prompts/{quote(prompt, safe='')}/file"
        response = await self._http.send("GET", path, headers={"Accept": "application/octet-stream"}, idempotent=True)
        if hashlib.sha256(response.content).hexdigest() != expected.sha256:
            raise IntegrityError(f"the file of prompt {prompt} doesn't match its SHA-256; download it again")
        return response.content

    async def delete(self, prompt: str) -> None:
        """Delete a prompt from the server. Deleting it twice does no harm."""
        await self._http.send("DELETE", f"/v1/prompts/{quote(prompt, safe='')}", idempotent=False)


class Prompts(Resource[AsyncPrompts]):
    """``client.prompts``"""

    upload = blocking(AsyncPrompts.upload)
    get = blocking(AsyncPrompts.get)
    list = iterating(AsyncPrompts.list)
    file = blocking(AsyncPrompts.file)
    delete = blocking(AsyncPrompts.delete)
