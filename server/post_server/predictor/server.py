"""The predictor process: takes questions from Redis, answers what waits in shared batches. Torch lives here."""

from __future__ import annotations

import json
import logging
import secrets
import signal
import threading
import time
from collections.abc import Sequence

import redis
import torch
from pydantic import ValidationError

from post_server.db.database import Database
from post_server.logs import configure_logs
from post_server.predictions import queue_client
from post_server.predictor.failures import as_post_error
from post_server.predictor.micro_batching import MicroBatcher, Question, Share
from post_server.predictor.model_cache import ModelCache, ReadyModel
from post_server.predictor.requests import CompletionRequest, FreeAnswers, GenerationRequest
from post_server.predictor.scheduler import Scheduler
from post_server.processes.library_logging import quiet_models
from post_server.settings import Settings
from post_server.storage.blob_store import BlobStore
from post_shared.errors import InvalidInput, PostError
from post_shared.inference.classification import Classified, ServedPrompt, classify_mixed
from post_shared.schemas.predictions import Prediction, PredictionCreate, Predictions

log = logging.getLogger("post.predictor")

_WAIT_SECONDS = 1.0
_MOST_TAKEN = 32
"""Questions that are taken from the list at once."""
_MOST_TEXTS = 1024
"""That wait in this process. The rest stays in the list, where another predictor can take it."""
_ANSWER_SECONDS = 60
"""How long an answer that nobody fetches is kept."""


class Predictor:
    """Answers one batch after the other. Whatever came while one ran goes into the next; nothing waits for company.

    Texts that are gone on with take one step between two batches, so that neither kind waits for the other's end.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = Database.from_settings(settings)
        self._shelf = ModelCache(settings, self._database, BlobStore.from_settings(settings))
        self._redis = redis.Redis.from_url(settings.redis_url, socket_timeout=10.0, socket_connect_timeout=2.0)
        self._name = secrets.token_hex(8)
        self._backlog = MicroBatcher()
        self._desk = Scheduler()

    def beat(self, stopping: threading.Event) -> None:
        """Give signs of life, in a thread of its own: a long batch is no death."""
        while not stopping.is_set():
            try:
                with self._redis.pipeline() as pipe:
                    for key in (queue_client.ALIVE, queue_client.alive_key(self._name)):
                        pipe.set(key, 1, ex=queue_client.ALIVE_SECONDS)
                    pipe.execute()
            except redis.RedisError as error:
                log.warning("redis away: %s", type(error).__name__)
            stopping.wait(queue_client.ALIVE_SECONDS / 3)

    def serve(self, stopping: threading.Event) -> None:
        """Answer until told to stop; what was taken by then is still answered."""
        while self._busy or not stopping.is_set():
            try:
                if not stopping.is_set():
                    self._take()
                self._drop_gone()
            except redis.RedisError as error:
                log.warning("redis away: %s", type(error).__name__)
                stopping.wait(_WAIT_SECONDS)
            self.work()

    def work(self) -> None:
        """One batch of predictions, and one token for every text that is gone on with."""
        self._backlog.drop_expired(time.time())
        self._answer(self._backlog.next_batch())
        for order, error in self._desk.step(time.time()):
            if error is not None:
                self._refuse(order, error)
            elif piece := order.part():
                self._send(order.reply, queue_client.part(piece))
            if error is None and order.ended:
                self._finish(order)

    def close(self) -> None:
        """Let go of the database and Redis."""
        self._database.dispose()
        self._redis.close()

    def predict(self, model: str, shares: Sequence[Share]) -> list[list[Prediction | PostError]]:
        """A prediction, or what is wrong, for every text of every share, all of them questions to ``model``.

        Shares of a generation task get nothing yet: they go to the desk.

        Raises:
            NotFound: there is no such model.
            TaskInvalid: a template leaves no room for a text.
        """
        ready, most = self._shelf.model(model), self._settings.predictor_text_tokens
        prompts = [self._prompt(ready, share.question.form) for share in shares]
        rows: list[tuple[str, ServedPrompt]] = [
            (text, prompt)
            for prompt, share in zip(prompts, shares, strict=True)
            if isinstance(prompt, ServedPrompt) and not prompt.task.is_generation
            for text in share.texts
        ]
        found = iter(
            classify_mixed(ready.model, [text for text, _ in rows], [prompt for _, prompt in rows], max_length=most)
        )
        results: list[list[Prediction | PostError]] = []
        for prompt, share in zip(prompts, shares, strict=True):
            if isinstance(prompt, PostError):
                results.append([prompt])
            elif prompt.task.is_generation:
                results.append([])
                self._desk.add(ready, FreeAnswers(ready.model, prompt, share, most))
            else:
                results.append([_prediction(prompt, next(found)) for _ in share.texts])
        return results

    @property
    def _busy(self) -> bool:
        return bool(len(self._backlog) or len(self._desk))

    def _prompt(self, ready: ReadyModel, form: PredictionCreate) -> ServedPrompt | PostError:
        try:
            return self._shelf.prompt(ready, form.prompt, form.task)
        except PostError as error:
            return error

    def _take(self) -> None:
        """Take what waits in the list; wait for it when there is nothing else to do."""
        if self._backlog.texts + len(self._desk) >= _MOST_TEXTS:
            return
        found: list[bytes | str] = []
        if not self._busy:
            first = self._redis.brpop([queue_client.QUESTIONS], timeout=_WAIT_SECONDS)
            if not first:
                return
            found.append(first[1])
        more = self._redis.rpop(queue_client.QUESTIONS, _MOST_TAKEN - len(found))
        found += more if isinstance(more, list) else []
        for data in found:
            self._read(data)

    def _read(self, data: bytes | str) -> None:
        try:
            document = json.loads(data)
            reply, deadline, payload = str(document["reply"]), float(document["deadline"]), document.get("payload")
        except (ValueError, KeyError, TypeError):
            log.error("a question that can't be read")
            return
        self._redis.set(queue_client.taken_key(reply), self._name, ex=queue_client.KEPT_SECONDS)
        try:
            if document.get("kind") == "completion":
                self._begin(reply, deadline, queue_client.CompletionQuestion.model_validate(payload))
            else:
                self._backlog.add(Question(reply, deadline, PredictionCreate.model_validate(payload)))
        except ValidationError:
            self._send(reply, queue_client.refusal(InvalidInput("the question is no request that a predictor knows")))
        except Exception as error:
            self._send(reply, queue_client.refusal(as_post_error(error)))

    def _begin(self, reply: str, deadline: float, question: queue_client.CompletionQuestion) -> None:
        ready = self._shelf.model(question.model)
        prompt = None if question.prompt is None else self._shelf.prompt(ready, question.prompt, None)
        most = self._settings.predictor_text_tokens
        self._desk.add(
            ready,
            CompletionRequest(ready.model, prompt, question, reply=reply, deadline=deadline, most_tokens=most),
        )

    def _drop_gone(self) -> None:
        """Work on nothing that nobody waits for any more."""
        orders = self._desk.orders
        if orders:
            gone = self._redis.mget([queue_client.gone_key(order.reply) for order in orders])
            self._desk.drop([order for order, left in zip(orders, gone, strict=True) if left is not None])

    def _answer(self, shares: Sequence[Share]) -> None:
        """Answer shares of one model together; when that fails, each alone, so that none spoils another's."""
        if not shares:
            return
        began = time.monotonic()
        try:
            results = self.predict(shares[0].question.form.model, shares)
        except Exception as error:
            if len(shares) > 1:
                for share in shares:
                    self._answer([share])
            else:
                self._refuse(shares[0].question, as_post_error(error))
            return
        for share, result in zip(shares, results, strict=True):
            self._add(share, result)
        texts = sum(len(share.texts) for share in shares)
        seconds = round(time.monotonic() - began, 3)
        log.info("answered", extra={"questions": len(shares), "texts": texts, "seconds": seconds})

    def _add(self, share: Share, result: Sequence[Prediction | PostError]) -> None:
        """Keep the results of some of a question's texts; send its answer once it has them all."""
        question = share.question
        for at, item in enumerate(result, share.start):
            if isinstance(item, PostError):
                self._refuse(question, item)
                return
            question.found[at] = item
        self._send_if_answered(question)

    def _finish(self, order: GenerationRequest) -> None:
        if isinstance(order, FreeAnswers):
            order.finish()
            self._send_if_answered(order.share.question)
        elif isinstance(order, CompletionRequest):
            self._send(order.reply, queue_client.answer(order.whole()))

    def _send_if_answered(self, question: Question) -> None:
        if question.answered and not question.refused:
            form = question.form
            items = [question.found[at] for at in range(len(form.texts))]
            document = Predictions(model_id=form.model, prompt_id=form.prompt, items=items)
            self._send(question.reply, queue_client.answer(document.model_dump(mode="json")))

    def _refuse(self, asked: Question | GenerationRequest, error: PostError) -> None:
        """Say once what is wrong; a question's other texts are then of no use to anyone."""
        question = asked.share.question if isinstance(asked, FreeAnswers) else asked
        if isinstance(question, Question):
            if question.refused:
                return
            question.refused = True
            self._backlog.drop(question)
        self._send(question.reply, queue_client.refusal(error))

    def _send(self, reply: str, data: str) -> None:
        try:
            with self._redis.pipeline() as pipe:
                pipe.lpush(reply, data)
                pipe.expire(reply, _ANSWER_SECONDS)
                pipe.execute()
        except redis.RedisError as error:
            log.warning("answer not sent: %s", type(error).__name__)


def _prediction(prompt: ServedPrompt, found: Classified) -> Prediction | PostError:
    if found.scores is None:
        return InvalidInput("the model's answers are no numbers; the prompt's may be far too large: tune it again")
    scores = dict(zip(prompt.task.labels, found.scores, strict=True))
    return Prediction(label=max(scores, key=lambda label: scores[label]), scores=scores, truncated=found.truncated)


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
