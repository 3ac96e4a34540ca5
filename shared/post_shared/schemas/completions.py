"""The documents of ``/v1/completions``, compatible with OpenAI's clients. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from post_shared.schemas.common import Document

MAX_ROWS = 128
"""Prompts times ``n`` in one request."""
MAX_LOGPROBS = 5


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and any(not isinstance(item, str) for item in value):
        raise ValueError("give texts, not token ids")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1, max_length=20_000)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class StreamOptions(Document):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(default=None, description="Has no effect.")


class CompletionCreate(Document):
    """Continue texts with a target model, with or without a soft prompt.

    Parameters of OpenAI's API that this server doesn't support are refused, not ignored.
    """

    model: str = Field(
        min_length=1, max_length=130, description="'<target model>:<soft prompt>', or '<target model>' without one."
    )
    prompt: Annotated[list[Text], BeforeValidator(_texts, json_schema_input_type=Text | list[Text])] = Field(
        min_length=1, max_length=MAX_ROWS, description="One text or several, used as they are: no template is applied."
    )
    max_tokens: int = Field(default=16, ge=1, le=4096)
    temperature: float = Field(default=1.0, ge=0, le=2, description="0: always the most likely token.")
    top_p: float = Field(default=1.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_ROWS, description="Number of answers per text.")
    seed: int | None = Field(
        default=None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same answers."
    )
    stop: Annotated[list[Stop], BeforeValidator(_as_list, json_schema_input_type=Stop | list[Stop])] | None = Field(
        default=None, max_length=4, description="An answer ends before the first of these strings."
    )
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="Needs the scope 'scores'.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512, description="Has no effect and is not stored.")
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(self.prompt) * self.n > MAX_ROWS:
            raise ValueError(f"{len(self.prompt)} texts times n = {self.n} are more than {MAX_ROWS} answers")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must equal n; request more answers with n and choose among them")
        if self.presence_penalty or self.frequency_penalty or self.logit_bias:
            raise ValueError("presence_penalty, frequency_penalty and logit_bias are not supported; leave them out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        return self


class Logprobs(Document):
    """One entry per token. ``text_offset`` counts characters from the start of the answer."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float] = Field(default_factory=list)
    top_logprobs: list[dict[str, float]] = Field(default_factory=list)
    text_offset: list[int] = Field(default_factory=list)


class Choice(Document):
    """Answer ``index % n`` to text ``index // n``; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(Document):
    """Token counts. The soft prompt's vectors are not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(Document):
    """A completion, or one event of a stream. The last event has no choices and, if requested, ``usage``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
