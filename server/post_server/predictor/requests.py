"""Generation requests: completions, and the free answers of generation tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from post_server.predictions.queue_client import CompletionQuestion
from post_server.predictor.continuous_batching import Text
from post_server.predictor.detokenizer import IncrementalDetokenizer
from post_server.predictor.micro_batching import Share
from post_shared.errors import InvalidInput
from post_shared.inference.classification import ServedPrompt
from post_shared.inference.generation import DecodingRow, Sampling
from post_shared.model.encoding import encode_rows, plain_ids
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.completions import Choice, CompletionCreate, Logprobs, Usage
from post_shared.schemas.predictions import Prediction


class GenerationRequest(Protocol):
    """The texts of one request that are generated together."""

    texts: list[Text]
    reply: str
    deadline: float

    @property
    def ended(self) -> bool: ...
    def part(self) -> dict[str, Any] | None:
        """The output since the last call, for a caller that streams; else None."""


class CompletionRequest:
    """A completion request."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: ServedPrompt | None,
        question: CompletionQuestion,
        *,
        reply: str,
        deadline: float,
        max_text_tokens: int,
    ) -> None:
        """
        Raises:
            InvalidInput: a text has no tokens, or doesn't fit the model with the prompt and the requested tokens.
        """
        self.reply, self.deadline, self.model_id, self._form = reply, deadline, question.model, question.form
        rows = plain_ids(model, question.form.prompt)
        for ids in rows:
            _check_length(model, prompt, ids, question.form.max_tokens, max_text_tokens)
        self._prompt_tokens = sum(len(ids) for ids in rows)
        self.texts = [
            _text(model, prompt, ids, question.form, number) for ids in rows for number in range(question.form.n)
        ]
        self._sent_characters = [0] * len(self.texts)
        self._sent_logprobs = [0] * len(self.texts)
        self._sent_end = [False] * len(self.texts)

    @property
    def ended(self) -> bool:
        return all(text.ended for text in self.texts)

    def part(self) -> dict[str, Any] | None:
        """The output that became certain since the last call; None when there is none or nobody streams."""
        choices = [choice for index in range(len(self.texts)) if (choice := self._new_choice(index)) is not None]
        if not choices or not self._form.stream:
            return None
        return {"choices": [choice.model_dump(mode="json") for choice in choices]}

    def result(self) -> dict[str, Any]:
        """All choices and the usage."""
        generated = sum(len(text.row.made) for text in self.texts)
        usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=generated,
            total_tokens=self._prompt_tokens + generated,
        )
        choices = [
            Choice(index=index, text=text.so_far.text, logprobs=text.logprobs, finish_reason=text.row.finish)
            for index, text in enumerate(self.texts)
        ]
        return {
            "choices": [choice.model_dump(mode="json") for choice in choices],
            "usage": usage.model_dump(mode="json"),
        }

    def _new_choice(self, index: int) -> Choice | None:
        text, start, sent_logprobs = self.texts[index], self._sent_characters[index], self._sent_logprobs[index]
        if self._sent_end[index] or (len(text.so_far.text) == start and not text.ended):
            return None
        logprobs = None
        if text.logprobs is not None:
            logprobs = Logprobs(**{name: values[sent_logprobs:] for name, values in text.logprobs.model_dump().items()})
            self._sent_logprobs[index] = len(text.logprobs.tokens)
        self._sent_characters[index], self._sent_end[index] = len(text.so_far.text), text.ended
        reason = text.row.finish if text.ended else None
        return Choice(index=index, text=text.so_far.text[start:], logprobs=logprobs, finish_reason=reason)


class FreeAnswers:
    """Some texts of a question whose task is generation: greedy, each answer one line."""

    def __init__(self, model: LanguageModel, prompt: ServedPrompt, share: Share, max_text_tokens: int) -> None:
        """
        Raises:
            InvalidInput: prompt and answer leave no positions for a text.
            TaskInvalid: the template alone is too long.
        """
        self.share, self.reply, self.deadline = share, share.question.reply, share.question.deadline
        max_new_tokens = share.question.request.max_new_tokens
        max_length = min(max_text_tokens, model.max_length - prompt.length - max_new_tokens)
        reserved = prompt.length + max_new_tokens
        rows = encode_rows(model, prompt.task, share.texts, max_length, reserved=reserved).rows
        self._truncated = [row.truncated for row in rows]
        self.texts = [
            Text(
                DecodingRow(row.token_ids, prompt.prefix, max_new_tokens), _so_far(model, row.token_ids), one_line=True
            )
            for row in rows
        ]

    @property
    def ended(self) -> bool:
        return all(text.ended for text in self.texts)

    def part(self) -> dict[str, Any] | None:
        """Predictions aren't streamed."""
        return None

    def finish(self) -> None:
        """Store the answers in their question."""
        for index, (text, truncated) in enumerate(zip(self.texts, self._truncated, strict=True), self.share.start):
            line = text.so_far.text.strip().split("\n")[0].strip()
            self.share.question.predictions[index] = Prediction(text=line, truncated=truncated)


def _text(
    model: LanguageModel, prompt: ServedPrompt | None, ids: Sequence[int], form: CompletionCreate, number: int
) -> Text:
    """``number`` counts the answers to one text: each is drawn differently, and the same with the same seed."""
    seed = None if form.seed is None else (form.seed + number) % 2**63
    sampling = Sampling(form.temperature, form.top_p, seed, form.logprobs)
    row = DecodingRow(ids, None if prompt is None else prompt.prefix, form.max_tokens, sampling)
    logprobs = None if form.logprobs is None else Logprobs()
    return Text(row, _so_far(model, ids, form.stop or ()), logprobs=logprobs)


def _so_far(model: LanguageModel, ids: Sequence[int], stop: Sequence[str] = ()) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(model.tokenizer, before=ids[-1], stop=stop)


def _check_length(
    model: LanguageModel, prompt: ServedPrompt | None, ids: Sequence[int], max_new_tokens: int, max_text_tokens: int
) -> None:
    if not ids:
        raise InvalidInput("a text has no tokens; there is nothing to continue")
    vectors = 0 if prompt is None else prompt.length
    if len(ids) > max_text_tokens or vectors + len(ids) + max_new_tokens > model.max_length:
        raise InvalidInput(
            f"a text of {len(ids)} tokens doesn't fit: the model has {model.max_length} positions, of which the soft "
            f"prompt takes {vectors} and max_tokens {max_new_tokens}, and this server takes texts of up to "
            f"{max_text_tokens} tokens; shorten the text or lower max_tokens"
        )
