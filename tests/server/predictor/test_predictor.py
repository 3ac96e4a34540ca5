"""Predictions through Redis equal those of a direct call; errors are reported, and in time."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from post_server.db.tables import ModelRow, PromptRow
from post_server.models.service import materialise_model
from post_server.predictions import queue_client
from post_server.predictor.micro_batching import MicroBatcher, Question
from post_server.predictor.server import Predictor
from post_shared.data.tasks import Task
from post_shared.errors import (
    InvalidInput,
    NotFound,
    PromptMismatch,
    TaskInvalid,
    Timeout,
    TooManyRequests,
    Unavailable,
)
from post_shared.files.prompt_file import read_prompt
from post_shared.inference.evaluation import classify, generate
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.predictions import PredictionCreate, Predictions
from tests.models import TEXTS
from tests.server.server_harness import TASK, ServerHarness, wait_for


def ask(server_harness: ServerHarness, *payloads: dict[str, Any], timeout: float = 20.0) -> list[Any]:
    """The answers to concurrent requests; errors are returned as values."""

    async def run() -> list[Any]:
        requests = [queue_client.request(each, timeout, settings=server_harness.settings) for each in payloads]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        await queue_client.close()
        return answers

    return asyncio.run(run())


def payload(model: ModelRow, prompt: PromptRow | None = None, **more: Any) -> dict[str, Any]:
    subject = {"prompt": prompt.id} if prompt else {"task": TASK.model_dump()}
    return {"model": model.id, "texts": TEXTS, **subject, **more}


@contextmanager
def running_predictor(server_harness: ServerHarness) -> Iterator[Predictor]:
    """The predictor's loop, in threads of this process."""
    predictor, stopping = Predictor(server_harness.settings), threading.Event()
    threads = [threading.Thread(target=loop, args=(stopping,)) for loop in (predictor.heartbeat, predictor.serve)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: asyncio.run(queue_client.alive(server_harness.settings)), 5.0)
        yield predictor
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        predictor.close()


def embeddings(server_harness: ServerHarness, prompt: PromptRow) -> torch.Tensor:
    return torch.from_numpy(read_prompt(server_harness.store.read(prompt.sha256)).embeddings)


def load(server_harness: ServerHarness, row: ModelRow, folder: Path) -> LanguageModel:
    return LanguageModel.load(materialise_model(server_harness.store, row, folder / row.id), device="cpu")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_answers_equal_a_direct_call(server_harness: ServerHarness, tmp_path: Path, family: str) -> None:
    server_harness.start_redis()
    row = server_harness.add_target(family=family)
    prompt = server_harness.add_source_prompt(row)
    model, task = load(server_harness, row, tmp_path), Task.from_spec(TASK)
    with running_predictor(server_harness):
        plain, prompted = ask(server_harness, payload(row), payload(row, prompt))
    for answer, vectors in ((plain, None), (prompted, embeddings(server_harness, prompt))):
        predictions = Predictions.model_validate(answer)
        expected = classify(model, task, TEXTS, vectors)
        scores = torch.tensor([[item.scores[label] for label in task.labels] for item in predictions.items])
        assert torch.allclose(scores, expected, atol=1e-5)
        assert [item.label for item in predictions.items] == [task.labels[i] for i in expected.argmax(-1).tolist()]
    assert plain != prompted
    assert (prompted["model_id"], prompted["prompt_id"]) == (row.id, prompt.id)


def test_free_answers(server_harness: ServerHarness, tmp_path: Path) -> None:
    server_harness.start_redis()
    row = server_harness.add_target()
    spec = {"template": "{text} is", "label_words": None}
    with running_predictor(server_harness):
        (answer,) = ask(server_harness, payload(row, task=spec, max_new_tokens=4))
    expected = generate(load(server_harness, row, tmp_path), Task("{text} is"), TEXTS, max_new_tokens=4)
    assert [item["text"] for item in answer["items"]] == expected


def test_concurrent_requests_share_batches_and_each_gets_its_own_answer(server_harness: ServerHarness) -> None:
    server_harness.start_redis()
    row = server_harness.add_target()
    prompt = server_harness.add_source_prompt(row)
    with running_predictor(server_harness) as predictor:
        alone = [ask(server_harness, payload(row, prompt, texts=[text]))[0] for text in TEXTS]
        sizes: list[int] = []
        predict = predictor.predict

        def slowly(model: Any, shares: Any) -> Any:
            sizes.append(len(shares))
            time.sleep(0.3)
            return predict(model, shares)

        predictor.predict = slowly  # type: ignore[method-assign]
        together = ask(server_harness, *(payload(row, prompt, texts=[text]) for text in TEXTS))
    for one, other in zip(alone, together, strict=True):
        for label, value in one["items"][0]["scores"].items():
            assert other["items"][0]["scores"][label] == pytest.approx(value, abs=1e-5)
    assert sum(sizes) == len(TEXTS)
    assert len(sizes) < len(TEXTS)


def test_invalid_requests_are_refused_and_do_not_affect_the_others(server_harness: ServerHarness) -> None:
    server_harness.start_redis()
    row, other = server_harness.add_target(), server_harness.add_target(name="wide", family="gpt2")
    prompt = server_harness.add_source_prompt(row)
    with server_harness.database.write() as session:
        session.get_one(PromptRow, prompt.id).width = 16
    multi_token = {"template": "{text}", "label_words": {"a": ["extraordinarily"], "b": ["bad"]}}
    with running_predictor(server_harness):
        answers = ask(
            server_harness,
            payload(row) | {"model": "mod_unknown"},
            payload(row) | {"prompt": "prm_unknown"},
            payload(other, prompt),
            payload(row, task=multi_token),
            payload(row) | {"task": None},
            payload(row) | {"texts": []},
            payload(row),
        )
    kinds = [type(answer) for answer in answers[:-1]]
    assert kinds == [NotFound, NotFound, PromptMismatch, TaskInvalid, InvalidInput, InvalidInput]
    assert len(Predictions.model_validate(answers[-1]).items) == len(TEXTS)


def test_without_redis_or_predictor_it_is_unavailable_immediately(server_harness: ServerHarness) -> None:
    row = server_harness.add_target()
    began = time.monotonic()
    (error,) = ask(server_harness, payload(row))
    assert type(error) is Unavailable
    server_harness.start_redis()
    (error,) = ask(server_harness, payload(row))
    assert type(error) is Unavailable
    assert time.monotonic() - began < 5.0
    with redis.Redis.from_url(server_harness.settings.redis_url) as client:
        assert client.llen(queue_client.QUESTIONS) == 0, "no request is left that nobody will answer"


def test_a_silent_predictor_times_out_and_its_request_is_not_answered_later(server_harness: ServerHarness) -> None:
    server_harness.start_redis()
    row = server_harness.add_target()
    with redis.Redis.from_url(server_harness.settings.redis_url) as client:
        client.set(queue_client.ALIVE, 1, ex=30)
        (error,) = ask(server_harness, payload(row), timeout=0.3)
        assert type(error) is Timeout
        reply = json.loads(client.lindex(queue_client.QUESTIONS, 0) or b"{}")["reply"]
        with running_predictor(server_harness):
            ask(server_harness, payload(row))
        assert not client.exists(reply)
        assert client.llen(queue_client.QUESTIONS) == 0


def test_a_predictor_that_stops_is_noticed(server_harness: ServerHarness) -> None:
    server_harness.start_redis()
    row = server_harness.add_target()
    with redis.Redis.from_url(server_harness.settings.redis_url) as client:
        client.set(queue_client.ALIVE, 1, px=500)
        began = time.monotonic()
        (error,) = ask(server_harness, payload(row))
    assert type(error) is Unavailable
    assert time.monotonic() - began < 5.0


def test_one_predictor_that_stops_is_noticed_while_others_run(server_harness: ServerHarness) -> None:
    server_harness.start_redis()
    row, stopping = server_harness.add_target(), threading.Event()
    lost, other = Predictor(server_harness.settings), Predictor(server_harness.settings)
    heartbeat = threading.Thread(target=other.heartbeat, args=(stopping,))
    with redis.Redis.from_url(server_harness.settings.redis_url) as client:
        heartbeat.start()
        wait_for(lambda: client.exists(queue_client.ALIVE), 5.0)
        taking = threading.Thread(target=lost._take)  # it never sends a heartbeat
        taking.start()
        (error,) = ask(server_harness, payload(row))
    taking.join()
    stopping.set()
    heartbeat.join()
    assert type(error) is Unavailable
    assert lost._batcher.waiting == len(TEXTS)
    lost.close()
    other.close()


def test_the_process_answers_logs_no_text_and_stops_on_a_signal(server_harness: ServerHarness) -> None:
    server_harness.start_redis()
    row = server_harness.add_target()
    predictor = server_harness.start_predictor()
    wait_for(lambda: asyncio.run(queue_client.alive(server_harness.settings)), 60.0)
    secret = "a superb unmistakable film"
    (answer,) = ask(server_harness, payload(row, texts=[secret]), timeout=60.0)
    assert answer["items"][0]["label"] in TASK.label_words  # type: ignore[operator]
    predictor.terminate()
    assert predictor.wait(10) == 0
    assert "unmistakable" not in server_harness.log()


def test_a_batch_has_one_model_and_a_long_question_shares_it_with_others() -> None:
    def question(model: str, texts: int, seconds: float = 9.0) -> Question:
        request = PredictionCreate(model=model, task=TASK, texts=[f"{number}" for number in range(texts)])
        return Question(model, time.time() + seconds, request)

    batcher = MicroBatcher()
    for each in (question("a", 200), question("b", 2), question("a", 3), question("a", 40), question("b", 1, -1.0)):
        batcher.add(each)
    batcher.drop_expired(time.time())
    assert batcher.waiting == 245
    batches = []
    while batch := batcher.next_batch(64):
        batches.append([(share.question.request.model, len(share.texts)) for share in batch])
    assert batches == [
        [("a", 31), ("a", 3), ("a", 30)],
        [("a", 54), ("a", 10)],
        [("a", 64)],
        [("a", 51)],
        [("b", 2)],
    ]
    assert len(batcher) == 0


def test_different_prompts_share_a_batch_and_an_invalid_one_affects_no_other(
    server_harness: ServerHarness, tmp_path: Path
) -> None:
    server_harness.start_redis()
    row = server_harness.add_target()
    prompts = [server_harness.add_source_prompt(row, length=length) for length in (4, 9)]
    model, task = load(server_harness, row, tmp_path), Task.from_spec(TASK)
    predictor = Predictor(server_harness.settings)
    payloads = [payload(row, each) for each in prompts] + [
        payload(row),
        payload(row) | {"prompt": "prm_gone", "task": None},
    ]
    replies = [f"reply{number}" for number in range(len(payloads))]
    with redis.Redis.from_url(server_harness.settings.redis_url) as client:
        for reply, each in zip(replies, payloads, strict=True):
            message = {"reply": reply, "deadline": time.time() + 60, "payload": each}
            client.lpush(queue_client.QUESTIONS, json.dumps(message))
        sizes: list[int] = []
        predict = predictor.predict
        predictor.predict = lambda model, shares: sizes.append(len(shares)) or predict(model, shares)  # type: ignore
        predictor._take()
        while predictor._busy:
            predictor.step()
        answers = [json.loads(client.lpop(reply) or b"{}") for reply in replies]
    predictor.close()
    assert sizes == [4]
    assert answers[3]["problem"]["code"] == "not_found"
    for answer, vectors in zip(answers, [*(embeddings(server_harness, each) for each in prompts), None], strict=False):
        predictions = Predictions.model_validate(answer["ok"])
        scores = torch.tensor([[item.scores[label] for label in task.labels] for item in predictions.items])
        assert torch.allclose(scores, classify(model, task, TEXTS, vectors), atol=1e-5)


def test_a_text_that_is_too_long_is_truncated_and_marked(server_harness: ServerHarness) -> None:
    server_harness.start_redis()
    row = server_harness.add_target()
    with running_predictor(server_harness):
        (answer,) = ask(server_harness, payload(row, texts=["a nice film " * 150, "a nice film"]))
    assert [item["truncated"] for item in answer["items"]] == [True, False]


def test_a_full_queue_refuses_with_a_time_to_retry_after(server_harness: ServerHarness) -> None:
    server_harness.start_redis()
    row = server_harness.add_target()
    with redis.Redis.from_url(server_harness.settings.redis_url) as client:
        client.set(queue_client.ALIVE, 1, ex=30)
        client.lpush(queue_client.QUESTIONS, *["{}"] * server_harness.settings.predictor_queue)
        (error,) = ask(server_harness, payload(row))
        assert type(error) is TooManyRequests
        assert error.fields["retry_after"] == 2
        assert client.llen(queue_client.QUESTIONS) == server_harness.settings.predictor_queue
