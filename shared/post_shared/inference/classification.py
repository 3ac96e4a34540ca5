"""Classification of texts that each have their own soft prompt, in shared batches.

A prompt is run once (:meth:`ServedPrompt.of`) and kept in a :class:`PromptCache`. After that it costs a text only
attention: :func:`classify_mixed` runs the text's tokens alone. Up to rounding, the results equal those of running the
prompt before each text, one text at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from post_shared.data.batches import Batch, EncodedRow, EncodedRows
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.memory_plan import plan_pass
from post_shared.model.prefix import Prefix
from post_shared.model.verbalizer import LabelWords, label_words

BATCH = {"cpu": (32, 1024), "cuda": (128, 8192)}
"""(rows, tokens of the texts without prompts) of a batch. Larger batches aren't faster on a CPU and add latency. A GPU
needs more to be filled, but each row also takes the memory of its prompt's keys and values."""


@dataclass(frozen=True, eq=False)
class ServedPrompt:
    """A task and the prompt that was tuned for it, if any, prepared for one model."""

    task: Task
    words: LabelWords | None
    """None for a generation task."""
    embeddings: Tensor | None
    """(l, d) on the model's device; None without a prompt."""
    prefix: Prefix | None
    """Keys and values of the prompt, if the model supports a prefix."""

    @classmethod
    def of(cls, model: LanguageModel, task: Task, embeddings: Tensor | None) -> ServedPrompt:
        """Run the prompt (l, d) once and keep its keys and values.

        Raises:
            TaskInvalid: the label words aren't single tokens of this model.
            PromptMismatch: the prompt has another width than the model.
            InvalidInput: the prompt leaves no position for a text.
        """
        words = None if task.is_generation else label_words(model, task)
        if embeddings is None:
            return cls(task, words, None, None)
        if embeddings.shape[0] >= model.max_length:
            raise InvalidInput(f"a prompt of {len(embeddings)} vectors fills the model's {model.max_length} positions")
        converted = embeddings.detach().to(model.device, model.dtype)
        return cls(task, words, converted, model.prefix(converted) if model.keeps_prefix else None)

    @property
    def length(self) -> int:
        """Number of positions that the prompt takes."""
        return 0 if self.embeddings is None else int(self.embeddings.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        embeddings = 0 if self.embeddings is None else self.embeddings.nbytes
        return embeddings + (0 if self.prefix is None else self.prefix.nbytes)


class PromptKey(NamedTuple):
    """The key of a cached prompt. It includes the tenant, so one caller can't observe another's entries."""

    tenant: str
    model: str
    prompt: str


class PromptCache:
    """Prepared prompts of at most ``max_bytes`` in all; the least recently used is evicted first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[PromptKey, ServedPrompt] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: PromptKey, make: Callable[[], ServedPrompt]) -> ServedPrompt:
        """The prompt of ``key``, from ``make()`` if it isn't cached. One larger than the whole cache isn't stored."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        prompt = make()
        if prompt.nbytes <= self._max_bytes:
            self._entries[key] = prompt
            self.nbytes += prompt.nbytes
        while self.nbytes > self._max_bytes:
            self._remove(next(iter(self._entries)))
        return prompt

    def forget(self, *, model: str) -> None:
        """Remove the prompts of ``model``, which is no longer in memory."""
        for key in [key for key in self._entries if key.model == model]:
            self._remove(key)

    def _remove(self, key: PromptKey) -> None:
        self.nbytes -= self._entries.pop(key).nbytes


@dataclass(frozen=True)
class Classified:
    """``scores`` are probabilities in the order of the task's labels; None if the outputs are NaN or infinite.

    ``truncated``: the text was too long and lost its end.
    """

    scores: tuple[float, ...] | None
    truncated: bool


@torch.no_grad()
def classify_mixed(
    model: LanguageModel,
    texts: Sequence[str],
    prompts: Sequence[ServedPrompt],
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
) -> list[Classified]:
    """Class probabilities of ``texts[i]`` with ``prompts[i]``, in the order of ``texts``.

    Prompts may differ in length and task, and texts may share a prompt object. A text with its template is truncated to
    ``max_length`` tokens and to the positions that its prompt leaves. This is the stable entry point for serving:
    ``classify_mixed(model, texts, [ServedPrompt.of(model, task, embeddings), …])``.

    Raises:
        TaskInvalid: a template alone is too long.
        OutOfMemory: not even one text at a time fits the free memory.
    """
    rows = _encode(model, texts, prompts, max_length)
    encoded = EncodedRows(tuple(rows))
    results: list[Classified] = [Classified(None, row.truncated) for row in rows]
    for index in _batchable(model, prompts):
        for batch in _batches(model, encoded.batch(index), max(prompts[i].length for i in index), batch_tokens):
            own = [prompts[i] for i in batch.index]
            words = {_words(prompt) for prompt in own}
            tokens: Tensor = torch.cat([each.token_ids for each in words]).unique()  # type: ignore[no-untyped-call]
            logits = _logits(model, batch, own, tokens)
            for i, scores in zip(batch.index, _scores(logits, tokens, own), strict=True):
                results[i] = Classified(scores, rows[i].truncated)
    return results


def _encode(
    model: LanguageModel, texts: Sequence[str], prompts: Sequence[ServedPrompt], max_length: int | None
) -> list[EncodedRow]:
    """The rows of ``texts``; those with the same template and maximum length are tokenised together."""
    groups: dict[tuple[str, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        available = model.max_length - prompt.length
        groups.setdefault(
            (prompt.task.template, available if max_length is None else min(max_length, available)), []
        ).append(i)
    rows: dict[int, EncodedRow] = {}
    for (_, limit), index in groups.items():
        encoded = encode_rows(model, prompts[index[0]].task, [texts[i] for i in index], limit)
        rows.update(zip(index, encoded.rows, strict=True))
    return [rows[i] for i in range(len(texts))]


def _batchable(model: LanguageModel, prompts: Sequence[ServedPrompt]) -> Iterator[list[int]]:
    """Groups of rows that can share a batch: all that have a prefix, and of the others those with one prompt length."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        has_prefix = prompt.prefix is not None
        groups.setdefault((has_prefix, 0 if has_prefix else prompt.length), []).append(i)
    yield from groups.values()


def _batches(model: LanguageModel, rows: Batch, length: int, tokens: int | None) -> list[Batch]:
    """Batches of ``tokens`` tokens or, if these with prompts of ``length`` don't fit the free memory, of fewer."""
    max_rows, default_tokens = BATCH.get(model.device.type, BATCH["cpu"])
    tokens = tokens or default_tokens
    fits = plan_pass(model, longest=rows.longest + length).positions
    if fits >= tokens + max_rows * length:
        return rows.split(max_rows, tokens=tokens)
    return rows.split(max_rows, tokens=min(fits, tokens), reserved=length)


def _words(prompt: ServedPrompt) -> LabelWords:
    if prompt.words is None:
        raise TypeError("a generation task has no classes to score")
    return prompt.words


def _logits(model: LanguageModel, batch: Batch, prompts: Sequence[ServedPrompt], tokens: Tensor) -> Tensor:
    """Logits (B, K) of ``tokens`` (K,), each row with its own prompt."""
    prefixes = [prompt.prefix for prompt in prompts if prompt.prefix is not None]
    if prefixes:
        return model.answer_logits(batch, prefixes, tokens=tokens)
    embeddings = [prompt.embeddings for prompt in prompts if prompt.embeddings is not None]
    return model.answer_logits(batch, torch.stack(embeddings) if embeddings else None, tokens=tokens)


def _scores(logits: Tensor, tokens: Tensor, prompts: Sequence[ServedPrompt]) -> list[tuple[float, ...] | None]:
    """Each row's probabilities over the labels of its own task, from logits (B, K) of the sorted ``tokens`` (K,)."""
    rows_of: dict[LabelWords, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows_of.setdefault(_words(prompt), []).append(i)
    scores: list[tuple[float, ...] | None] = [None] * len(prompts)
    for words, rows in rows_of.items():
        columns = torch.searchsorted(tokens, words.token_ids).to(logits.device)
        probabilities = words.scores(logits[rows][:, columns]).softmax(-1).cpu()  # (B, K) -> (B', C)
        finite = torch.isfinite(probabilities).all(-1).tolist()
        for i, values, is_finite in zip(rows, probabilities.tolist(), finite, strict=True):
            scores[i] = tuple(values) if is_finite else None
    return scores
