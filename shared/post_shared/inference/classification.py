"""Serving: texts that each stand behind a soft prompt of their own, answered in shared batches.

A prompt is made ready once (:meth:`ServedPrompt.of`), kept in a :class:`PromptCache`, and then costs a text nothing
but attention: :func:`classify_mixed` runs the text's tokens alone. Results are those of the prompt put before each
text, one at a time, within rounding.
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
"""Rows, and tokens of texts, prompts not counted: with more a CPU is no faster, and only the last in the batch wait for
the first. A GPU needs more to be filled; each row takes its prompt's keys and values there, so not far more."""


@dataclass(frozen=True, eq=False)
class ServedPrompt:
    """A task with the prompt that was tuned for it, if any, ready for one model."""

    task: Task
    words: LabelWords | None
    """None for a generation task."""
    embeddings: Tensor | None
    """(l, d) on the model's device; None: the model is asked without a prompt."""
    prefix: Prefix | None
    """Of the embeddings, if the model can keep one."""

    @classmethod
    def of(cls, model: LanguageModel, task: Task, embeddings: Tensor | None) -> ServedPrompt:
        """Run the prompt (l, d) once and keep what texts see of it.

        Raises:
            TaskInvalid: the task's label words are none for this model.
            PromptMismatch: the prompt has another width than the model.
            InvalidInput: the prompt leaves no room for a text.
        """
        words = None if task.is_generation else label_words(model, task)
        if embeddings is None:
            return cls(task, words, None, None)
        if embeddings.shape[0] >= model.max_length:
            raise InvalidInput(f"a prompt of {len(embeddings)} vectors fills the model's {model.max_length} positions")
        placed = embeddings.detach().to(model.device, model.dtype)
        return cls(task, words, placed, model.prefix(placed) if model.keeps_prefix else None)

    @property
    def length(self) -> int:
        """Positions that the prompt takes."""
        return 0 if self.embeddings is None else int(self.embeddings.shape[0])

    @property
    def nbytes(self) -> int:
        """Memory that keeping it takes."""
        kept = 0 if self.embeddings is None else self.embeddings.nbytes
        return kept + (0 if self.prefix is None else self.prefix.nbytes)


class PromptKey(NamedTuple):
    """What a ready prompt belongs to. The tenant is part of it: no caller's request finds what another's left."""

    tenant: str
    model: str
    prompt: str


class PromptCache:
    """Ready prompts, at most ``max_bytes`` of them; the one that wasn't used for longest goes first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[PromptKey, ServedPrompt] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: PromptKey, make: Callable[[], ServedPrompt]) -> ServedPrompt:
        """The prompt of ``key``, made if need be. One that is larger than the whole cache is made, and not kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = make()
        if made.nbytes <= self._max_bytes:
            self._kept[key] = made
            self.nbytes += made.nbytes
        while self.nbytes > self._max_bytes:
            self._remove(next(iter(self._kept)))
        return made

    def forget(self, *, model: str) -> None:
        """Drop what belongs to ``model``, which is no longer in memory."""
        for key in [key for key in self._kept if key.model == model]:
            self._remove(key)

    def _remove(self, key: PromptKey) -> None:
        self.nbytes -= self._kept.pop(key).nbytes


@dataclass(frozen=True)
class Classified:
    """``scores`` are probabilities in the order of the task's labels; None when the model's answers are no numbers.

    ``truncated`` says that the text was too long and lost its end.
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
    """Class probabilities of ``texts[i]`` behind ``prompts[i]``, in the order of ``texts``.

    Prompts may differ in length and in task, and texts may share a prompt object. A text is cut so that it fits, with
    its template, ``max_length`` tokens and what the prompt leaves of the model's positions. This is the stable entry
    for serving: ``classify_mixed(model, texts, [ServedPrompt.of(model, task, embeddings), …])``.

    Raises:
        TaskInvalid: a template alone is too long.
        OutOfMemory: not even one text at a time fits the free memory.
    """
    rows = _encode(model, texts, prompts, max_length)
    encoded = EncodedRows(tuple(rows))
    found: list[Classified] = [Classified(None, row.truncated) for row in rows]
    for index in _alike(model, prompts):
        for batch in _batches(model, encoded.batch(index), max(prompts[at].length for at in index), batch_tokens):
            mine = [prompts[at] for at in batch.index]
            words = {_words(prompt) for prompt in mine}
            tokens: Tensor = torch.cat([each.token_ids for each in words]).unique()  # type: ignore[no-untyped-call]
            logits = _logits(model, batch, mine, tokens)
            for at, scores in zip(batch.index, _scores(logits, tokens, mine), strict=True):
                found[at] = Classified(scores, rows[at].truncated)
    return found


def _encode(
    model: LanguageModel, texts: Sequence[str], prompts: Sequence[ServedPrompt], max_length: int | None
) -> list[EncodedRow]:
    """The rows of ``texts``, those of one template and length tokenised together."""
    groups: dict[tuple[str, int], list[int]] = {}
    for at, prompt in enumerate(prompts):
        reserved = model.max_length - prompt.length
        groups.setdefault(
            (prompt.task.template, reserved if max_length is None else min(max_length, reserved)), []
        ).append(at)
    rows: dict[int, EncodedRow] = {}
    for (_, most), index in groups.items():
        encoded = encode_rows(model, prompts[index[0]].task, [texts[at] for at in index], most)
        rows.update(zip(index, encoded.rows, strict=True))
    return [rows[at] for at in range(len(texts))]


def _alike(model: LanguageModel, prompts: Sequence[ServedPrompt]) -> Iterator[list[int]]:
    """The rows that can share a batch: with a prefix all, else those whose prompts have one length."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for at, prompt in enumerate(prompts):
        kept = prompt.prefix is not None
        groups.setdefault((kept, 0 if kept else prompt.length), []).append(at)
    yield from groups.values()


def _batches(model: LanguageModel, rows: Batch, length: int, tokens: int | None) -> list[Batch]:
    """The rows in batches of so many tokens or, with their prompts of ``length``, of as many as fit the free memory."""
    count, usual = BATCH.get(model.device.type, BATCH["cpu"])
    tokens = tokens or usual
    fits = plan_pass(model, longest=rows.longest + length).positions
    if fits >= tokens + count * length:
        return rows.split(count, tokens=tokens)
    return rows.split(count, tokens=min(fits, tokens), reserved=length)


def _words(prompt: ServedPrompt) -> LabelWords:
    if prompt.words is None:
        raise TypeError("a generation task has no classes to score")
    return prompt.words


def _logits(model: LanguageModel, batch: Batch, prompts: Sequence[ServedPrompt], tokens: Tensor) -> Tensor:
    """(B, K) at the tokens (K,), each row behind its own prompt."""
    prefixes = [prompt.prefix for prompt in prompts if prompt.prefix is not None]
    if prefixes:
        return model.answer_logits(batch, prefixes, tokens=tokens)
    embeddings = [prompt.embeddings for prompt in prompts if prompt.embeddings is not None]
    return model.answer_logits(batch, torch.stack(embeddings) if embeddings else None, tokens=tokens)


def _scores(logits: Tensor, tokens: Tensor, prompts: Sequence[ServedPrompt]) -> list[tuple[float, ...] | None]:
    """Each row's probabilities over the labels of its own task, from logits (B, K) at the rising ``tokens`` (K,)."""
    rows_of: dict[LabelWords, list[int]] = {}
    for at, prompt in enumerate(prompts):
        rows_of.setdefault(_words(prompt), []).append(at)
    found: list[tuple[float, ...] | None] = [None] * len(prompts)
    for words, rows in rows_of.items():
        own = torch.searchsorted(tokens, words.token_ids).to(logits.device)
        chances = words.scores(logits[rows][:, own]).softmax(-1).cpu()  # (B, K) -> (B', C)
        good = torch.isfinite(chances).all(-1).tolist()
        for at, values, finite in zip(rows, chances.tolist(), good, strict=True):
            found[at] = tuple(values) if finite else None
    return found
