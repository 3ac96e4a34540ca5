"""Predictions through Redis are those of a plain call; what can't be answered is said, and in time."""

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

from post_server.model_store import materialise_model
from post_server.predictor import transport
from post_server.predictor.models import LastUsed
from post_server.predictor.server import Predictor, Question, _joined
from post_server.records import ModelRow, PromptRow
from post_shared.errors import InvalidInput, NotFound, PromptMismatch, TaskInvalid, Timeout, Unavailable
from post_shared.evaluation import classify, generate
from post_shared.language_model import LanguageModel
from post_shared.prompt_file import read_prompt
from post_shared.schemas import PredictionCreate, Predictions
from post_shared.tasks import Task
from tests.models import TEXTS
from tests.server.backstage import TASK, Backstage, wait_for


def ask(backstage: Backstage, *payloads: dict[str, Any], timeout: float = 20.0) -> list[Any]:
    """The answers to questions asked at once; errors are values."""

    async def run() -> list[Any]:
        asked = [transport.request(each, timeout, settings=backstage.settings) for each in payloads]
        found = await asyncio.gather(*asked, return_exceptions=True)
        await transport.close()
        return found

    return asyncio.run(run())


def payload(model: ModelRow, prompt: PromptRow | None = None, **more: Any) -> dict[str, Any]:
    asked = {"prompt": prompt.id} if prompt else {"task": TASK.model_dump()}
    return {"model": model.id, "texts": TEXTS, **asked, **more}


@contextmanager
def answering(backstage: Backstage) -> Iterator[Predictor]:
    """The predictor's own loop, in threads of this process."""
    predictor, stopping = Predictor(backstage.settings), threading.Event()
    threads = [threading.Thread(target=work, args=(stopping,)) for work in (predictor.beat, predictor.serve)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: asyncio.run(transport.alive(backstage.settings)), 5.0)
        yield predictor
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        predictor.close()


def embeddings(backstage: Backstage, prompt: PromptRow) -> torch.Tensor:
    return torch.from_numpy(read_prompt(backstage.store.read(prompt.sha256)).embeddings)


def load(backstage: Backstage, row: ModelRow, folder: Path) -> LanguageModel:
    return LanguageModel.load(materialise_model(backstage.store, row, folder / row.id), device="cpu")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_answers_equal_a_plain_call(backstage: Backstage, tmp_path: Path, family: str) -> None:
    backstage.start_redis()
    row = backstage.add_target(family=family)
    prompt = backstage.add_source_prompt(row)
    model, task = load(backstage, row, tmp_path), Task.from_form(TASK)
    with answering(backstage):
        plain, prompted = ask(backstage, payload(row), payload(row, prompt))
    for answer, used in ((plain, None), (prompted, embeddings(backstage, prompt))):
        found = Predictions.model_validate(answer)
        expected = classify(model, task, TEXTS, used)
        scores = torch.tensor([[item.scores[label] for label in task.labels] for item in found.items])
        assert torch.allclose(scores, expected, atol=1e-5)
        assert [item.label for item in found.items] == [task.labels[at] for at in expected.argmax(-1).tolist()]
    assert plain != prompted
    assert (prompted["model_id"], prompted["prompt_id"]) == (row.id, prompt.id)


def test_free_answers(backstage: Backstage, tmp_path: Path) -> None:
    backstage.start_redis()
    row = backstage.add_target()
    form = {"template": "{text} is", "label_words": None}
    with answering(backstage):
        (answer,) = ask(backstage, payload(row, task=form, max_new_tokens=4))
    expected = generate(load(backstage, row, tmp_path), Task("{text} is"), TEXTS, max_new_tokens=4)
    assert [item["text"] for item in answer["items"]] == expected


def test_questions_asked_at_once_are_joined_and_each_gets_its_own(backstage: Backstage) -> None:
    backstage.start_redis()
    row = backstage.add_target()
    prompt = backstage.add_source_prompt(row)
    with answering(backstage) as predictor:
        alone = [ask(backstage, payload(row, prompt, texts=[text]))[0] for text in TEXTS]
        sizes: list[int] = []
        predict = predictor.predict

        def slowly(form: Any, texts: Any) -> Any:
            sizes.append(len(texts))
            time.sleep(0.3)
            return predict(form, texts)

        predictor.predict = slowly  # type: ignore[method-assign]
        together = ask(backstage, *(payload(row, prompt, texts=[text]) for text in TEXTS))
    for one, other in zip(alone, together, strict=True):
        for label, value in one["items"][0]["scores"].items():
            assert other["items"][0]["scores"][label] == pytest.approx(value, abs=1e-5)
    assert sum(sizes) == len(TEXTS)
    assert len(sizes) < len(TEXTS)


def test_what_cannot_be_answered_is_refused_and_spoils_nothing(backstage: Backstage) -> None:
    backstage.start_redis()
    row, narrow = backstage.add_target(), backstage.add_target(name="wide", family="gpt2")
    prompt = backstage.add_source_prompt(row)
    with backstage.database.write() as session:
        session.get_one(PromptRow, prompt.id).width = 16
    several = {"template": "{text}", "label_words": {"a": ["extraordinarily"], "b": ["bad"]}}
    with answering(backstage):
        answers = ask(
            backstage,
            payload(row) | {"model": "mod_unknown"},
            payload(row) | {"prompt": "prm_unknown"},
            payload(narrow, prompt),
            payload(row, task=several),
            payload(row) | {"task": None},
            payload(row) | {"texts": []},
            payload(row),
        )
    kinds = [type(answer) for answer in answers[:-1]]
    assert kinds == [NotFound, NotFound, PromptMismatch, TaskInvalid, InvalidInput, InvalidInput]
    assert len(Predictions.model_validate(answers[-1]).items) == len(TEXTS)


def test_without_redis_or_predictor_it_is_unavailable_at_once(backstage: Backstage) -> None:
    row = backstage.add_target()
    began = time.monotonic()
    (error,) = ask(backstage, payload(row))
    assert type(error) is Unavailable
    backstage.start_redis()
    (error,) = ask(backstage, payload(row))
    assert type(error) is Unavailable
    assert time.monotonic() - began < 5.0
    with redis.Redis.from_url(backstage.settings.redis_url) as client:
        assert client.llen(transport.QUESTIONS) == 0, "nothing waits that nobody will answer"


def test_a_silent_predictor_times_out_and_its_question_is_not_answered_later(backstage: Backstage) -> None:
    backstage.start_redis()
    row = backstage.add_target()
    with redis.Redis.from_url(backstage.settings.redis_url) as client:
        client.set(transport.ALIVE, 1, ex=30)
        (error,) = ask(backstage, payload(row), timeout=0.3)
        assert type(error) is Timeout
        reply = json.loads(client.lindex(transport.QUESTIONS, 0) or b"{}")["reply"]
        with answering(backstage):
            ask(backstage, payload(row))
        assert not client.exists(reply)
        assert client.llen(transport.QUESTIONS) == 0


def test_a_predictor_that_goes_away_is_noticed(backstage: Backstage) -> None:
    backstage.start_redis()
    row = backstage.add_target()
    with redis.Redis.from_url(backstage.settings.redis_url) as client:
        client.set(transport.ALIVE, 1, px=500)
        began = time.monotonic()
        (error,) = ask(backstage, payload(row))
    assert type(error) is Unavailable
    assert time.monotonic() - began < 5.0


def test_the_process_answers_logs_no_text_and_stops_when_told(backstage: Backstage) -> None:
    backstage.start_redis()
    row = backstage.add_target()
    predictor = backstage.start_predictor()
    wait_for(lambda: asyncio.run(transport.alive(backstage.settings)), 60.0)
    secret = "a superb unmistakable film"
    (answer,) = ask(backstage, payload(row, texts=[secret]), timeout=60.0)
    assert answer["items"][0]["label"] in TASK.label_words  # type: ignore[operator]
    predictor.terminate()
    assert predictor.wait(10) == 0
    assert "unmistakable" not in backstage.log()


def test_groups_are_alike_and_bearable() -> None:
    def question(model: str, texts: int) -> Question:
        form = PredictionCreate(model=model, task=TASK, texts=["a"] * texts)
        return Question("reply", time.time() + 1, form)

    asked = [question("a", 200), question("b", 1), question("a", 56), question("a", 1), question("b", 2)]
    groups = [[(each.form.model, len(each.form.texts)) for each in group] for group in _joined(asked)]
    assert groups == [[("a", 200), ("a", 56)], [("b", 1), ("b", 2)], [("a", 1)]]


def test_the_last_used_stay() -> None:
    kept: LastUsed[int, int] = LastUsed(2)
    made: list[int] = []

    def get(key: int) -> int:
        return kept.get(key, lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    for key in (1, 2, 1, 3, 1, 2):
        assert get(key) == key
        assert len(kept) <= 2
    assert made == [1, 2, 3, 2]
