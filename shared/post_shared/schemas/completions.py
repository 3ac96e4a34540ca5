"""The documents of ``/v1/completions``, in the shape that OpenAI's clients send and read. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from post_shared.schemas.common import Document

MOST_ROWS = 128
"""Prompts times ``n`` in one request."""
MOST_LOGPROBS = 5


def _texts(given: Any) -> Any:
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and any(not isinstance(each, str) for each in given):
        raise ValueError("give texts, not token ids")
    return given


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


Text = Annotated[str, Field(min_length=1, max_length=20_000)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class StreamOptions(Document):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(default=None, description="Has no effect.")


class CompletionCreate(Document):
    """Go on with texts, by a target model through a soft prompt or without one.

    What the shape has and this server can't do is refused, not ignored.
    """

    model: str = Field(
        min_length=1, max_length=130, description="'<target model>:<soft prompt>', or '<target model>' without one."
    )
    prompt: Annotated[list[Text], BeforeValidator(_texts, json_schema_input_type=Text | list[Text])] = Field(
        min_length=1, max_length=MOST_ROWS, description="A text or several, as they are: no template is applied."
    )
    max_tokens: int = Field(default=16, ge=1, le=4096)
    temperature: float = Field(default=1.0, ge=0, le=2, description="0: always the likeliest token.")
    top_p: float = Field(default=1.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=MOST_ROWS, description="Answers to each text.")
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1, description="The same seed draws the same.")
    stop: Annotated[list[Stop], BeforeValidator(_listed, json_schema_input_type=Stop | list[Stop])] | None = Field(
        default=None, max_length=4, description="A text ends before the first of these."
    )
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS, description="Needs the scope 'scores'.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512, description="Has no effect, and is not kept.")
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(self.prompt) * self.n > MOST_ROWS:
            raise ValueError(f"{len(self.prompt)} texts times n = {self.n} are more than {MOST_ROWS} answers")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of other than n is not possible here; ask for more with n and choose yourself")
        if self.presence_penalty or self.frequency_penalty or self.logit_bias:
            raise ValueError("presence_penalty, frequency_penalty and logit_bias are not possible here; leave them out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self


class Logprobs(Document):
    """One entry for each token. ``text_offset`` counts characters from the answer's beginning."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float] = Field(default_factory=list)
    top_logprobs: list[dict[str, float]] = Field(default_factory=list)
    text_offset: list[int] = Field(default_factory=list)


class Choice(Document):
    """The answer number ``index % n`` to the text number ``index // n``; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(Document):
    """Tokens. The soft prompt's vectors are not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(Document):
    """A whole completion, or one event of a stream, whose last one has no choices but ``usage`` if it was asked for."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
