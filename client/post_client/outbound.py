"""The only way a prompt leaves the data owner's machine.

:func:`build_upload` builds the whole upload request. It depends on the prompt file alone: no clock, no random
number, no name or path of this machine. Sending adds the address (``Host``) and the API key
(``Authorization``), nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from post_client.http.session import USER_AGENT
from post_shared.errors import InvalidInput
from post_shared.files.prompt_file import PromptFile, read_prompt, write_prompt

UPLOAD_PATH = "/v1/prompts"


@dataclass(frozen=True)
class OutboundRequest:
    """A request that uploads a prompt, complete except for the address and the API key."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def to_bytes(self) -> bytes:
        """The request as it is sent over HTTP/1.1."""
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + self.body


def build_upload(prompt: PromptFile) -> OutboundRequest:
    """The request that uploads ``prompt``. Its body is the prompt file's bytes."""
    body = write_prompt(prompt)
    headers = (
        ("Accept", "application/json"),
        ("Content-Length", str(len(body))),
        ("Content-Type", "application/octet-stream"),
        ("User-Agent", USER_AGENT),
    )
    return OutboundRequest("POST", UPLOAD_PATH, headers, body)


def check_outbound(request: OutboundRequest) -> None:
    """Check that ``request`` is byte for byte what :func:`build_upload` builds.

    Raises:
        InvalidInput: it isn't.
        PromptFileInvalid: its body isn't a prompt file.
    """
    if not isinstance(request, OutboundRequest) or build_upload(read_prompt(request.body)) != request:
        raise InvalidInput("only a request made by build_upload(prompt_file) may be uploaded")


def describe(request: OutboundRequest) -> dict[str, Any]:
    """What the provider learns from a request, read back from its bytes."""
    prompt = read_prompt(request.body)
    return {
        "request": f"{request.method} {request.path}",
        "body_bytes": len(request.body),
        "total_bytes": len(request.to_bytes()),
        "numbers": f"{prompt.length} vectors of {prompt.width} float32",
        "model_hash": prompt.model_hash,
        "template": prompt.task.template,
        "label_words": prompt.task.label_words,
        "epsilon": prompt.epsilon,
        "delta": prompt.delta,
    }
