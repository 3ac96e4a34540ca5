"""What requests want written: completions, and the free answers of generation tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from post_server.predictions.queue_client import CompletionQuestion
from post_server.predictor.continuous_batching import Text
from post_server.predictor.detokenizer import TextSoFar
from post_server.predictor.micro_batching import Share
from post_shared.errors import InvalidInput
from post_shared.inference.classification import ServedPrompt
from post_shared.inference.generation import DecodingRow, Sampling
from post_shared.model.encoding import encode_rows, plain_ids
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.completions import Choice, CompletionCreate, Logprobs, Usage
from post_shared.schemas.predictions import Prediction


class GenerationRequest(Protocol):
    """Texts of one request that are gone on with together."""

    texts: list[Text]
    reply: str
    deadline: float

    @property
    def ended(self) -> bool: ...
    def part(self) -> dict[str, Any] | None:
        """What is new since the last call, for a caller that follows; else None."""


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
        most_tokens: int,
    ) -> None:
        """
        Raises:
            InvalidInput: a text has no tokens, or doesn't fit the model with the prompt and what is asked for.
        """
        self.reply, self.deadline, self.model_id, self._form = reply, deadline, question.model, question.form
        ids = plain_ids(model, question.form.prompt)
        for each in ids:
            _check_room(model, prompt, each, question.form.max_tokens, most_tokens)
        self._prompt_tokens = sum(len(each) for each in ids)
        self.texts = [_text(model, prompt, each, question.form, at) for each in ids for at in range(question.form.n)]
        self._shown = [0] * len(self.texts)
        self._logged = [0] * len(self.texts)
        self._told = [False] * len(self.texts)

    @property
    def ended(self) -> bool:
        return all(text.ended for text in self.texts)

    def part(self) -> dict[str, Any] | None:
        """The pieces that became certain since the last call; None when there are none or nobody follows."""
        pieces = [piece for at in range(len(self.texts)) if (piece := self._piece(at)) is not None]
        if not pieces or not self._form.stream:
            return None
        return {"choices": [piece.model_dump(mode="json") for piece in pieces]}

    def whole(self) -> dict[str, Any]:
        """All choices and the usage."""
        made = sum(len(text.row.made) for text in self.texts)
        usage = Usage(
            prompt_tokens=self._prompt_tokens, completion_tokens=made, total_tokens=self._prompt_tokens + made
        )
        choices = [
            Choice(index=at, text=text.so_far.text, logprobs=text.logprobs, finish_reason=text.row.finish)
            for at, text in enumerate(self.texts)
        ]
        return {
            "choices": [choice.model_dump(mode="json") for choice in choices],
            "usage": usage.model_dump(mode="json"),
        }

    def _piece(self, at: int) -> Choice | None:
        text, start, logged = self.texts[at], self._shown[at], self._logged[at]
        if self._told[at] or (len(text.so_far.text) == start and not text.ended):
            return None
        logprobs = None
        if text.logprobs is not None:
            logprobs = Logprobs(**{name: values[logged:] for name, values in text.logprobs.model_dump().items()})
            self._logged[at] = len(text.logprobs.tokens)
        self._shown[at], self._told[at] = len(text.so_far.text), text.ended
        reason = text.row.finish if text.ended else None
        return Choice(index=at, text=text.so_far.text[start:], logprobs=logprobs, finish_reason=reason)


class FreeAnswers:
    """Some texts of a question whose task is generation: greedy, each answer one line."""

    def __init__(self, model: LanguageModel, prompt: ServedPrompt, share: Share, most_tokens: int) -> None:
        """
        Raises:
            InvalidInput: prompt and answer leave no room for a text.
            TaskInvalid: the template alone is too long.
        """
        self.share, self.reply, self.deadline = share, share.question.reply, share.question.deadline
        most = share.question.form.max_new_tokens
        reserved = min(most_tokens, model.max_length - prompt.length - most)
        rows = encode_rows(model, prompt.task, share.texts, reserved, reserved=prompt.length + most).rows
        self._cut = [row.truncated for row in rows]
        self.texts = [
            Text(DecodingRow(row.token_ids, prompt.prefix, most), _so_far(model, row.token_ids), one_line=True)
            for row in rows
        ]

    @property
    def ended(self) -> bool:
        return all(text.ended for text in self.texts)

    def part(self) -> dict[str, Any] | None:
        """Nobody follows a prediction."""
        return None

    def finish(self) -> None:
        """Put the answers where their question wants them."""
        for at, (text, cut) in enumerate(zip(self.texts, self._cut, strict=True)):
            line = text.so_far.text.strip().split("\n")[0].strip()
            self.share.question.found[self.share.start + at] = Prediction(text=line, truncated=cut)


def _text(
    model: LanguageModel, prompt: ServedPrompt | None, ids: Sequence[int], form: CompletionCreate, number: int
) -> Text:
    """``number`` counts the answers to one text: each draws differently, and the same with the same seed."""
    seed = None if form.seed is None else (form.seed + number) % 2**63
    sampling = Sampling(form.temperature, form.top_p, seed, form.logprobs)
    row = DecodingRow(ids, None if prompt is None else prompt.prefix, form.max_tokens, sampling)
    logprobs = None if form.logprobs is None else Logprobs()
    return Text(row, _so_far(model, ids, form.stop or ()), logprobs=logprobs)


def _so_far(model: LanguageModel, ids: Sequence[int], stop: Sequence[str] = ()) -> TextSoFar:
    return TextSoFar(model.tokenizer, before=ids[-1], stop=stop)


def _check_room(
    model: LanguageModel, prompt: ServedPrompt | None, ids: Sequence[int], most_new: int, most_tokens: int
) -> None:
    if not ids:
        raise InvalidInput("a text has no tokens; there is nothing to go on with")
    vectors = 0 if prompt is None else prompt.length
    if len(ids) > most_tokens or vectors + len(ids) + most_new > model.max_length:
        raise InvalidInput(
            f"a text of {len(ids)} tokens doesn't fit: the model has {model.max_length} positions, of which the soft "
            f"prompt takes {vectors} and max_tokens {most_new}, and this server takes texts of up to {most_tokens} "
            "tokens; shorten the text or lower max_tokens"
        )
