"""The predictor process: takes questions from Redis, joins what belongs together, answers. Torch lives here."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import redis
import torch
from pydantic import ValidationError

from post_server.database import Database
from post_server.logs import configure_logs
from post_server.predictor import transport
from post_server.predictor.models import Shelf
from post_server.settings import Settings
from post_server.storage import BlobStore
from post_server.worker.quiet import quiet_models
from post_shared.errors import InvalidInput, PostError
from post_shared.evaluation import classify, generate
from post_shared.schemas import Prediction, PredictionCreate, Predictions
from post_shared.tasks import Task

log = logging.getLogger("post.predictor")

_WAIT_SECONDS = 1.0
_MOST_JOINED = 32
"""Questions that are taken from the list at once."""
_MOST_TEXTS = 256
"""In one joined batch, so that nobody waits long for the texts of others."""
_ANSWER_SECONDS = 60
"""How long an answer that nobody fetches is kept."""


@dataclass(frozen=True)
class Question:
    """A request that still waits for its answer."""

    reply: str
    deadline: float
    form: PredictionCreate

    @property
    def group(self) -> str:
        """Equal for questions that can share a batch: all but the texts is the same."""
        return self.form.model_dump_json(exclude={"texts"})


class Predictor:
    """Answers questions one batch after the other."""

    def __init__(self, settings: Settings) -> None:
        self._database = Database.from_settings(settings)
        self._shelf = Shelf(settings, self._database, BlobStore.from_settings(settings))
        self._redis = redis.Redis.from_url(settings.redis_url, socket_timeout=10.0, socket_connect_timeout=2.0)

    def beat(self, stopping: threading.Event) -> None:
        """Give signs of life, in a thread of its own: a long batch is no death."""
        while not stopping.is_set():
            try:
                self._redis.set(transport.ALIVE, 1, ex=transport.ALIVE_SECONDS)
            except redis.RedisError as error:
                log.warning("redis away: %s", type(error).__name__)
            stopping.wait(transport.ALIVE_SECONDS / 3)

    def serve(self, stopping: threading.Event) -> None:
        """Answer until told to stop; the batch under way is still answered."""
        while not stopping.is_set():
            try:
                questions = self._take()
            except redis.RedisError as error:
                log.warning("redis away: %s", type(error).__name__)
                stopping.wait(_WAIT_SECONDS)
                continue
            for group in _joined(questions):
                self._answer([question for question in group if question.deadline > time.time()])

    def close(self) -> None:
        """Let go of the database and Redis."""
        self._database.dispose()
        self._redis.close()

    def predict(self, form: PredictionCreate, texts: Sequence[str]) -> list[Prediction]:
        """One prediction per text, in order."""
        ready = self._shelf.model(form.model)
        prompt = self._shelf.prompt(ready, form.prompt) if form.prompt else None
        if prompt is not None:
            task = prompt.task
        elif form.task is not None:
            task = Task.from_form(form.task)
        else:
            raise InvalidInput("a prediction needs a prompt or a task")
        if task.is_generation:
            embeddings = prompt.embeddings if prompt else None
            made = generate(ready.model, task, texts, embeddings, max_new_tokens=form.max_new_tokens)
            return [Prediction(text=text) for text in made]
        scores = classify(ready.model, task, texts, prompt.for_classes if prompt else None)  # (N, C)
        return [_prediction(task, row) for row in scores.tolist()]

    def _take(self) -> list[Question]:
        """The next question, and those that wait behind it."""
        first = self._redis.brpop([transport.QUESTIONS], timeout=_WAIT_SECONDS)
        if not first:
            return []
        more = self._redis.rpop(transport.QUESTIONS, _MOST_JOINED - 1) or []
        found = [self._read(data) for data in [first[1], *more]]
        return [question for question in found if question is not None]

    def _read(self, data: bytes | str) -> Question | None:
        try:
            document = json.loads(data)
            reply, deadline = str(document["reply"]), float(document["deadline"])
        except (ValueError, KeyError, TypeError):
            log.error("a question that can't be read")
            return None
        try:
            return Question(reply, deadline, PredictionCreate.model_validate(document["payload"]))
        except (ValidationError, KeyError):
            self._send(reply, transport.refusal(InvalidInput("the question is no prediction request")))
            return None

    def _answer(self, group: Sequence[Question]) -> None:
        """Answer questions of one group together; when that fails, each alone, so that none spoils another's."""
        if not group:
            return
        began = time.monotonic()
        texts = [text for question in group for text in question.form.texts]
        form = group[0].form
        try:
            items = self.predict(form, texts)
        except Exception as error:
            if len(group) > 1:
                for question in group:
                    self._answer([question])
                return
            self._send(group[0].reply, transport.refusal(_as_post_error(error)))
            return
        at = 0
        for question in group:
            mine = items[at : at + len(question.form.texts)]
            at += len(mine)
            document = Predictions(model_id=form.model, prompt_id=form.prompt, items=mine)
            self._send(question.reply, transport.answer(document.model_dump(mode="json")))
        log.info(
            "answered",
            extra={"questions": len(group), "texts": len(texts), "seconds": round(time.monotonic() - began, 3)},
        )

    def _send(self, reply: str, data: str) -> None:
        try:
            with self._redis.pipeline() as pipe:
                pipe.lpush(reply, data)
                pipe.expire(reply, _ANSWER_SECONDS)
                pipe.execute()
        except redis.RedisError as error:
            log.warning("answer not sent: %s", type(error).__name__)


def _joined(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions that can share a batch, in the order in which they came, each group of a bearable size."""
    open_groups: dict[str, list[Question]] = {}
    groups: list[list[Question]] = []
    for question in questions:
        group = open_groups.get(question.group)
        if group is None or sum(len(q.form.texts) for q in group) + len(question.form.texts) > _MOST_TEXTS:
            group = open_groups[question.group] = []
            groups.append(group)
        group.append(question)
    return groups


def _prediction(task: Task, row: Sequence[float]) -> Prediction:
    scores = dict(zip(task.labels, row, strict=True))
    return Prediction(label=max(scores, key=lambda label: scores[label]), scores=scores)


def _as_post_error(error: Exception) -> PostError:
    if isinstance(error, PostError):
        return error
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else "?"
    # Neither the message nor the frames' values: either could hold a text.
    log.error("prediction failed: %s at %s", type(error).__name__, place)
    return PostError("the prediction failed unexpectedly; the predictor's log says more")


def main(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; a second signal doesn't wait for the batch under way."""
    configure_logs(settings)
    quiet_models()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    stopping = threading.Event()

    def stop(number: int, _frame: object) -> None:
        if stopping.is_set():
            raise SystemExit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    predictor = Predictor(settings)
    threading.Thread(target=predictor.beat, args=(stopping,), daemon=True).start()
    log.info("predictor ready")
    try:
        predictor.serve(stopping)
    finally:
        stopping.set()
        predictor.close()
    return 0
