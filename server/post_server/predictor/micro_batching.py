"""Texts that wait for their turn, and which of them share the next batch. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle

from post_shared.schemas.predictions import Prediction, PredictionCreate

BATCH_TEXTS = 64
"""Texts between two looks at the queue: enough to keep the processor busy, few enough that nobody waits long."""


@dataclass(eq=False)
class Question:
    """A request for predictions, and the answers that it has got so far, by the number of their text."""

    reply: str
    deadline: float
    form: PredictionCreate
    begun: int = 0
    """Texts that were handed out."""
    found: dict[int, Prediction] = field(default_factory=dict)
    refused: bool = False

    @property
    def left(self) -> int:
        """Texts that still wait."""
        return len(self.form.texts) - self.begun

    @property
    def answered(self) -> bool:
        return len(self.found) == len(self.form.texts)


@dataclass(frozen=True, eq=False)
class Share:
    """The part of a batch that is one question's: some of its texts, the first with the number ``start``."""

    question: Question
    start: int
    texts: Sequence[str]


class MicroBatcher:
    """Questions in the order in which they came. One with many texts lets the others into every batch."""

    def __init__(self) -> None:
        self._questions: list[Question] = []

    def __len__(self) -> int:
        return len(self._questions)

    @property
    def texts(self) -> int:
        """Texts that wait."""
        return sum(question.left for question in self._questions)

    def add(self, question: Question) -> None:
        self._questions.append(question)

    def drop(self, question: Question) -> None:
        """Hand out no more of its texts."""
        if question in self._questions:
            self._questions.remove(question)

    def drop_expired(self, now: float) -> None:
        """Forget the questions that nobody waits for any more."""
        self._questions = [question for question in self._questions if question.deadline > now]

    def next_batch(self, size: int = BATCH_TEXTS) -> list[Share]:
        """Up to ``size`` texts for the model of the oldest question, in even shares; nothing when nothing waits."""
        if not self._questions:
            return []
        same = [question for question in self._questions if question.form.model == self._questions[0].form.model]
        counts = dict.fromkeys(same, 0)
        left = min(size, sum(question.left for question in same))
        for question in cycle(same):
            if left == 0:
                break
            if counts[question] < question.left:
                counts[question] += 1
                left -= 1
        return [self._share(question, count) for question, count in counts.items() if count]

    def _share(self, question: Question, count: int) -> Share:
        start = question.begun
        question.begun += count
        if question.left == 0:
            self.drop(question)
        return Share(question, start, question.form.texts[start : question.begun])
