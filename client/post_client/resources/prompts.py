"""Soft prompts at the provider: source prompts that you uploaded, target prompts that came from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from urllib.parse import quote

from post_client._http import Http, parse
from post_client.outbound import OutboundRequest, check_outbound
from post_shared.errors import IntegrityError
from post_shared.schemas import Prompt, PromptRole


class Prompts:
    """``client.prompts``"""

    def __init__(self, http: Http) -> None:
        self._http = http

    def upload(self, request: OutboundRequest) -> Prompt:
        """Send what :func:`post_client.outbound.build_upload` built, and nothing else.

        The same bytes again give the same prompt, so this is repeated when the server is away.
        """
        check_outbound(request)
        answer = self._http.send(
            request.method, request.path, content=request.body, headers=dict(request.headers), repeat=True
        )
        return parse(answer, Prompt)

    def get(self, prompt: str) -> Prompt:
        """One prompt, by id."""
        return self._http.get(f"/v1/prompts/{quote(prompt, safe='')}", Prompt)

    def list(self, *, role: PromptRole | str | None = None) -> Iterator[Prompt]:
        """Your prompts; a provider sees all."""
        every = self._http.pages("/v1/prompts", Prompt)
        return (prompt for prompt in every if role is None or prompt.role == role)

    def file(self, prompt: str) -> bytes:
        """The prompt file. Target prompts belong to the target model: only the provider gets those."""
        about = self.get(prompt)
        path = f"/v1/prompts/{quote(prompt, safe='')}/file"
        data = self._http.send("GET", path, headers={"Accept": "application/octet-stream"}, repeat=True).content
        if hashlib.sha256(data).hexdigest() != about.sha256:
            raise IntegrityError(f"the file of prompt {prompt} doesn't match its SHA-256; fetch it again")
        return data

    def delete(self, prompt: str) -> None:
        """Remove a prompt from the server. Removing it twice does no harm."""
        self._http.send("DELETE", f"/v1/prompts/{quote(prompt, safe='')}", repeat=False)
