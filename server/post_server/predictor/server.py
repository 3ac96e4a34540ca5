"""The predictor process: takes requests from Redis and answers them in shared batches. It imports torch."""

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
from post_server.predictor.failures import NOT_FINITE, as_post_error
from post_server.predictor.micro_batching import MicroBatcher, Question, Share
from post_server.predictor.model_cache import LoadedModel, ModelCache
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
_MAX_TAKEN = 32
"""Requests taken from the list at once."""
_MAX_TEXTS = 1024
"""Waiting in this process. The rest stays in the list, where another predictor can take it."""
_ANSWER_SECONDS = 60
"""How long an answer is kept if nobody fetches it."""


class Predictor:
    """Answers one batch after another. What arrives during a batch goes into the next; no batch waits to be full.

    Texts being generated advance by one token between two batches, so that neither kind waits for the other to end.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = Database.from_settings(settings)
        self._models = ModelCache(settings, self._database, BlobStore.from_settings(settings))
        self._redis = redis.Redis.from_url(settings.redis_url, socket_timeout=10.0, socket_connect_timeout=2.0)
        self._name = secrets.token_hex(8)
        self._batcher = MicroBatcher()
        self._scheduler = Scheduler()

    def heartbeat(self, stopping: threading.Event) -> None:
        """Show that the predictor is alive, from a thread of its own: a batch may take long."""
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
        """Answer until ``stopping`` is set; what was taken by then is still answered."""
        while self._busy or not stopping.is_set():
            try:
                if not stopping.is_set():
                    self._take()
                self._drop_gone()
            except redis.RedisError as error:
                log.warning("redis away: %s", type(error).__name__)
                stopping.wait(_WAIT_SECONDS)
            self.step()

    def step(self) -> None:
        """Answer one batch of predictions, and generate one token for every running text."""
        self._batcher.drop_expired(time.time())
        self._answer(self._batcher.next_batch())
        for request, error in self._scheduler.step(time.time()):
            if error is not None:
                self._refuse(request, error)
            elif part := request.part():
                self._send(request.reply, queue_client.part(part))
            if error is None and request.ended:
                self._finish(request)

    def close(self) -> None:
        """Close the connections to the database and Redis."""
        self._database.dispose()
        self._redis.close()

    def predict(self, model: str, shares: Sequence[Share]) -> list[list[Prediction | PostError]]:
        """A prediction or an error for every text of every share, all of them for ``model``.

        Shares of a generation task get an empty list: they go to the scheduler.

        Raises:
            NotFound: there is no such model.
            TaskInvalid: a template leaves no tokens for a text.
        """
        loaded, max_tokens = self._models.model(model), self._settings.predictor_text_tokens
        prompts = [self._prompt(loaded, share.question.request) for share in shares]
        rows: list[tuple[str, ServedPrompt]] = [
            (text, prompt)
            for prompt, share in zip(prompts, shares, strict=True)
            if isinstance(prompt, ServedPrompt) and not prompt.task.is_generation
            for text in share.texts
        ]
        texts, row_prompts = [text for text, _ in rows], [prompt for _, prompt in rows]
        classified = iter(classify_mixed(loaded.model, texts, row_prompts, max_length=max_tokens))
        results: list[list[Prediction | PostError]] = []
        for prompt, share in zip(prompts, shares, strict=True):
            if isinstance(prompt, PostError):
                results.append([prompt])
            elif prompt.task.is_generation:
                results.append([])
                self._scheduler.add(loaded, FreeAnswers(loaded.model, prompt, share, max_tokens))
            else:
                results.append([_prediction(prompt, next(classified)) for _ in share.texts])
        return results

    @property
    def _busy(self) -> bool:
        return bool(len(self._batcher) or len(self._scheduler))

    def _prompt(self, loaded: LoadedModel, request: PredictionCreate) -> ServedPrompt | PostError:
        try:
            return self._models.prompt(loaded, request.prompt, request.task)
        except PostError as error:
            return error

    def _take(self) -> None:
        """Take requests from the list; wait for one when there is nothing else to do."""
        if self._batcher.waiting + len(self._scheduler) >= _MAX_TEXTS:
            return
        messages: list[bytes | str] = []
        if not self._busy:
            first = self._redis.brpop([queue_client.QUESTIONS], timeout=_WAIT_SECONDS)
            if not first:
                return
            messages.append(first[1])
        more = self._redis.rpop(queue_client.QUESTIONS, _MAX_TAKEN - len(messages))
        messages += more if isinstance(more, list) else []
        for message in messages:
            self._read(message)

    def _read(self, message: bytes | str) -> None:
        try:
            document = json.loads(message)
            reply, deadline, payload = str(document["reply"]), float(document["deadline"]), document.get("payload")
        except (ValueError, KeyError, TypeError):
            log.error("unreadable request")
            return
        self._redis.set(queue_client.taken_key(reply), self._name, ex=queue_client.KEPT_SECONDS)
        try:
            if document.get("kind") == "completion":
                self._begin(reply, deadline, queue_client.CompletionQuestion.model_validate(payload))
            else:
                self._batcher.add(Question(reply, deadline, PredictionCreate.model_validate(payload)))
        except ValidationError:
            self._send(reply, queue_client.refusal(InvalidInput("the predictor can't parse this request")))
        except Exception as error:
            self._send(reply, queue_client.refusal(as_post_error(error)))

    def _begin(self, reply: str, deadline: float, question: queue_client.CompletionQuestion) -> None:
        loaded = self._models.model(question.model)
        prompt = None if question.prompt is None else self._models.prompt(loaded, question.prompt, None)
        max_tokens = self._settings.predictor_text_tokens
        request = CompletionRequest(
            loaded.model, prompt, question, reply=reply, deadline=deadline, max_text_tokens=max_tokens
        )
        self._scheduler.add(loaded, request)

    def _drop_gone(self) -> None:
        """Drop the requests whose caller is gone."""
        requests = self._scheduler.requests
        if requests:
            marks = self._redis.mget([queue_client.gone_key(request.reply) for request in requests])
            self._scheduler.drop([request for request, mark in zip(requests, marks, strict=True) if mark is not None])

    def _answer(self, shares: Sequence[Share]) -> None:
        """Answer shares of one model together; if that fails, each alone, so that one error affects one question."""
        if not shares:
            return
        began = time.monotonic()
        try:
            results = self.predict(shares[0].question.request.model, shares)
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
        """Store results of one question; send its answer once it is complete."""
        question = share.question
        for index, item in enumerate(result, share.start):
            if isinstance(item, PostError):
                self._refuse(question, item)
                return
            question.predictions[index] = item
        self._send_if_answered(question)

    def _finish(self, request: GenerationRequest) -> None:
        if isinstance(request, FreeAnswers):
            request.finish()
            self._send_if_answered(request.share.question)
        elif isinstance(request, CompletionRequest):
            self._send(request.reply, queue_client.answer(request.result()))

    def _send_if_answered(self, question: Question) -> None:
        if question.answered and not question.refused:
            request = question.request
            items = [question.predictions[index] for index in range(len(request.texts))]
            document = Predictions(model_id=request.model, prompt_id=request.prompt, items=items)
            self._send(question.reply, queue_client.answer(document.model_dump(mode="json")))

    def _refuse(self, request: Question | GenerationRequest, error: PostError) -> None:
        """Send the error, once; the other texts of a question are dropped."""
        question = request.share.question if isinstance(request, FreeAnswers) else request
        if isinstance(question, Question):
            if question.refused:
                return
            question.refused = True
            self._batcher.drop(question)
        self._send(question.reply, queue_client.refusal(error))

    def _send(self, reply: str, data: str) -> None:
        try:
            with self._redis.pipeline() as pipe:
                pipe.lpush(reply, data)
                pipe.expire(reply, _ANSWER_SECONDS)
                pipe.execute()
        except redis.RedisError as error:
            log.warning("answer not sent: %s", type(error).__name__)


def _prediction(prompt: ServedPrompt, result: Classified) -> Prediction | PostError:
    if result.scores is None:
        return NOT_FINITE
    scores = dict(zip(prompt.task.labels, result.scores, strict=True))
    return Prediction(label=max(scores, key=lambda label: scores[label]), scores=scores, truncated=result.truncated)


def main(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; a second signal doesn't wait for the current batch."""
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
    threading.Thread(target=predictor.heartbeat, args=(stopping,), daemon=True).start()
    log.info("predictor ready")
    try:
        predictor.serve(stopping)
    finally:
        stopping.set()
        predictor.close()
    return 0
