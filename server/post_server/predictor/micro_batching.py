"""Micro-batching: which of the waiting texts share the next batch. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle

from post_shared.schemas.predictions import Prediction, PredictionCreate

BATCH_TEXTS = 64
"""Texts between two checks of the queue: enough to keep the processor busy, few enough for a short wait."""


@dataclass(eq=False)
class Question:
    """A prediction request, and the predictions made so far, by the index of their text."""

    reply: str
    deadline: float
    request: PredictionCreate
    started: int = 0
    """Texts that were put into a batch."""
    predictions: dict[int, Prediction] = field(default_factory=dict)
    refused: bool = False

    @property
    def waiting(self) -> int:
        """Number of texts that still wait."""
        return len(self.request.texts) - self.started

    @property
    def answered(self) -> bool:
        return len(self.predictions) == len(self.request.texts)


@dataclass(frozen=True, eq=False)
class Share:
    """One question's part of a batch: some of its texts, of which the first has the index ``start``."""

    question: Question
    start: int
    texts: Sequence[str]


class MicroBatcher:
    """Questions in order of arrival. One with many texts shares every batch with the others."""

    def __init__(self) -> None:
        self._questions: list[Question] = []

    def __len__(self) -> int:
        return len(self._questions)

    @property
    def waiting(self) -> int:
        """Number of texts that wait."""
        return sum(question.waiting for question in self._questions)

    def add(self, question: Question) -> None:
        self._questions.append(question)

    def drop(self, question: Question) -> None:
        """Put no more of its texts into batches."""
        if question in self._questions:
            self._questions.remove(question)

    def drop_expired(self, now: float) -> None:
        """Remove the questions whose deadline has passed."""
        self._questions = [question for question in self._questions if question.deadline > now]

    def next_batch(self, size: int = BATCH_TEXTS) -> list[Share]:
        """Up to ``size`` texts for the model of the oldest question, in even shares; empty when nothing waits."""
        if not self._questions:
            return []
        model = self._questions[0].request.model
        same_model = [question for question in self._questions if question.request.model == model]
        counts = dict.fromkeys(same_model, 0)
        left = min(size, sum(question.waiting for question in same_model))
        for question in cycle(same_model):
            if left == 0:
                break
            if counts[question] < question.waiting:
                counts[question] += 1
                left -= 1
        return [self._share(question, count) for question, count in counts.items() if count]

    def _share(self, question: Question, count: int) -> Share:
        start = question.started
        question.started += count
        if question.waiting == 0:
            self.drop(question)
        return Share(question, start, question.request.texts[start : question.started])
