"""OpenAI's own client against ``/v1/completions``: a real API server and Redis server, the predictor's real loop."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis
import torch
from openai import OpenAI
from typer.testing import CliRunner

from post_server.auth.keys import create_key
from post_server.models.service import materialise_model
from post_server.predictions import queue_client
from post_server.predictor.server import Predictor
from post_shared.cli.app import build_app
from post_shared.files.prompt_file import read_prompt
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.common import Role
from post_shared.schemas.keys import Scope
from tests.models import TEXTS
from tests.server.http_harness import TASK, HttpHarness, code, prompt_bytes
from tests.server.server_harness import ServerHarness, wait_for


class Stage:
    """The whole provider's side but its worker, with a tiny model, a prompt of Alice's and OpenAI's client."""

    def __init__(self, home: Path) -> None:
        self.http_harness = HttpHarness(home, device="cpu", threads=1)
        self.server_harness = ServerHarness(self.http_harness.settings)
        self.server_harness.start_redis()
        self.row = self.server_harness.add_target(name="large")
        self.data = prompt_bytes(self.row.hash, length=5, width=32)
        self.prompt = str(self.http_harness.push("alice", self.data).json()["id"])
        self.name = f"large:{self.prompt}"
        self.model = LanguageModel.load(
            materialise_model(self.server_harness.store, self.row, home / "plain"), device="cpu"
        )
        self.predictor = Predictor(self.http_harness.settings)
        self.pause = 0.0
        step = self.predictor._desk.step
        self.predictor._desk.step = lambda now: time.sleep(self.pause) or step(now)  # type: ignore[method-assign, func-returns-value]
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=work, args=(self._stopping,))
            for work in (self.predictor.beat, self.predictor.serve)
        ]
        for thread in self._threads:
            thread.start()
        self.openai = self.client("alice")
        wait_for(lambda: self.redis.exists(queue_client.ALIVE), 10.0)

    @property
    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.http_harness.settings.redis_url)

    def client(self, who: str) -> OpenAI:
        return OpenAI(
            base_url=f"{self.http_harness.url}/v1", api_key=self.http_harness.keys[who], max_retries=0, timeout=30
        )

    def plain(self, text: str, most: int, *, prompted: bool = True) -> str:
        """Transformers' own greedy generation with the prompt's embeddings in front."""
        inputs = self.model.embed(torch.tensor([self.model.tokenizer(text).input_ids]))
        if prompted:
            inputs = torch.cat([torch.from_numpy(read_prompt(self.data).embeddings)[None], inputs], 1)
        made = self.model.model.generate(inputs_embeds=inputs, max_new_tokens=most, do_sample=False, pad_token_id=0)
        return str(self.model.tokenizer.decode(made[0], skip_special_tokens=True))

    def close(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self.predictor.close()
        self.openai.close()
        self.server_harness.close()
        self.http_harness.close()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="post-") as home:
        made = Stage(Path(home))
        yield made
        made.close()


def test_greedy_equals_transformers_for_a_text_and_for_several(stage: Stage) -> None:
    one = stage.openai.completions.create(model=stage.name, prompt=TEXTS[0], max_tokens=9, temperature=0)
    assert one.choices[0].text == stage.plain(TEXTS[0], 9)
    assert (one.object, one.model, one.choices[0].finish_reason) == ("text_completion", stage.name, "length")
    assert one.usage is not None
    length = len(stage.model.tokenizer(TEXTS[0]).input_ids)
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.total_tokens) == (length, 9, length + 9)
    many = stage.openai.completions.create(model=stage.name, prompt=TEXTS, max_tokens=7, temperature=0)
    assert [choice.text for choice in many.choices] == [stage.plain(text, 7) for text in TEXTS]
    bare = stage.openai.completions.create(model="large", prompt=TEXTS[0], max_tokens=9, temperature=0)
    assert bare.choices[0].text == stage.plain(TEXTS[0], 9, prompted=False) != one.choices[0].text


def test_a_stream_brings_the_same_in_pieces(stage: Stage) -> None:
    asked: dict[str, Any] = {
        "model": stage.name,
        "prompt": TEXTS[:3],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 1,
    }
    whole = stage.openai.completions.create(**asked)
    texts, reasons, tokens, events = ["", "", ""], {}, [[], [], []], []
    for event in stage.openai.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        events.append(event)
        for choice in event.choices:
            assert choice.index not in reasons, "nothing follows the end"
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens  # type: ignore[union-attr, operator, arg-type]
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]  # type: ignore[union-attr]
    assert set(reasons) == {0, 1, 2}
    assert len(events) > 4, "pieces come as they are made"
    assert events[-1].usage == whole.usage
    assert not events[-1].choices
    assert {event.id for event in events} == {events[0].id}


def test_the_stream_ends_as_openais_does(stage: Stage) -> None:
    asked = {"model": stage.name, "prompt": "nice", "max_tokens": 2, "stream": True}
    answer = stage.http_harness("alice", "POST", "/v1/completions", json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: {") for line in lines[:-1])
    assert lines[-1] == "data: [DONE]"


def test_drawn_answers_differ_and_a_seed_repeats_them(stage: Stage) -> None:
    asked: dict[str, Any] = {"model": stage.name, "prompt": TEXTS[:2], "n": 4, "max_tokens": 8, "temperature": 1.5}
    first = stage.openai.completions.create(**asked, seed=3)
    again = stage.openai.completions.create(**asked, seed=3)
    other = stage.openai.completions.create(**asked, seed=4)
    texts = [[choice.text for choice in each.choices] for each in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0][:4])) > 1
    assert [choice.index for choice in first.choices] == list(range(8))
    cold = stage.openai.completions.create(**(asked | {"top_p": 0.0}), seed=9)
    assert [choice.text for choice in cold.choices[::4]] == [stage.plain(text, 8) for text in TEXTS[:2]]


def test_a_stop_text_ends_an_answer_and_is_left_out(stage: Stage) -> None:
    whole = stage.plain(TEXTS[1], 12)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    asked: dict[str, Any] = {"model": stage.name, "prompt": TEXTS[1], "max_tokens": 12, "temperature": 0}
    choice = stage.openai.completions.create(**asked, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    pieces = stage.openai.completions.create(**asked, stop=["nowhere", stop], stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"logit_bias": {"7": 1}}, "logit_bias"),
        ({"suffix": "end"}, "suffix"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": [1, 2, 3]}, "token ids"),
        ({"prompt": [[1, 2], [3]]}, "token ids"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "answers"),
        ({"temperature": 2.1}, "temperature"),
        ({"logprobs": 6}, "logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"max_tokens": 255}, "256 positions"),
        ({"prompt": "a nice film " * 200}, "256 positions"),
        ({"extra_body": {"functions": []}}, "functions"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_possible_is_refused(stage: Stage, change: dict[str, Any], words: str, stream: bool) -> None:
    asked = {"model": stage.name, "prompt": "a film", "max_tokens": 2} | change
    with pytest.raises(openai.UnprocessableEntityError, match=words) as refused:
        stage.openai.completions.create(**asked, stream=stream)
    assert refused.value.code == "invalid_input"


def test_who_may_ask_what(stage: Stage) -> None:
    other = prompt_bytes(stage.http_harness.add_model("other").hash)
    narrow = stage.http_harness.push("alice", other).json()["id"]
    cases: list[tuple[str, str, type[openai.APIStatusError]]] = [
        ("bob", stage.name, openai.NotFoundError),
        ("alice", "none", openai.NotFoundError),
        ("alice", "large:", openai.NotFoundError),
        ("alice", "large:prm_none", openai.NotFoundError),
        ("alice", f"large:{narrow}", openai.UnprocessableEntityError),
    ]
    for who, model, kind in cases:
        with stage.client(who) as client, pytest.raises(kind):
            client.completions.create(model=model, prompt="a")
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{stage.http_harness.url}/v1", api_key="post_no", max_retries=0).completions.create(
            model="a", prompt="a"
        )
    assert stage.client("provider").completions.create(model=stage.name, prompt="a", max_tokens=1).choices


def test_logprobs_need_the_scope_scores(stage: Stage) -> None:
    with stage.http_harness.database.write() as session:
        row, key = create_key(session, name="shy", role=Role.OWNER, scopes=[Scope.PREDICT])
    stage.http_harness.add_caller("shy", row, key)
    with stage.client("shy") as client:
        assert client.completions.create(model="large", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.PermissionDeniedError, match="scores"):
            client.completions.create(model="large", prompt="a", max_tokens=1, logprobs=0)


@pytest.mark.parametrize("stream", [False, True])
def test_when_the_caller_goes_away_the_predictor_stops(stage: Stage, stream: bool) -> None:
    stage.pause = 0.05
    try:
        asked = {"model": stage.name, "prompt": "a", "max_tokens": 240, "stream": stream, "logit_bias": None}
        with httpx.Client(
            base_url=stage.http_harness.url, headers={"Authorization": f"Bearer {stage.http_harness.keys['alice']}"}
        ) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json=asked) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=asked, timeout=0.5)
        (order,) = stage.predictor._desk.orders
        wait_for(lambda: not stage.predictor._desk.orders, 8.0)
        assert len(order.texts[0].row.made) < 200
    finally:
        stage.pause = 0.0


def test_a_prediction_does_not_wait_for_a_generation(stage: Stage) -> None:
    stage.pause = 0.02
    try:
        asked = {"model": stage.name, "prompt": ["a", "nice"], "max_tokens": 150, "temperature": 0, "stream": True}
        stream = stage.openai.completions.create(**asked)  # type: ignore[call-overload]
        next(iter(stream))
        question = {"model": "large", "task": TASK.model_dump(), "texts": TEXTS}
        answer = stage.http_harness("alice", "POST", "/v1/predictions", json=question)
        assert len(answer.json()["items"]) == len(TEXTS)
        assert stage.predictor._desk.orders, "the stream is still under way"
        late = stage.openai.completions.create(model=stage.name, prompt="dull", max_tokens=3, temperature=0)
        assert late.choices[0].text == stage.plain("dull", 3)
        assert stage.predictor._desk.orders, "a short request joins a long one and leaves before its end"
        stream.close()
        wait_for(lambda: not stage.predictor._desk.orders, 8.0)
    finally:
        stage.pause = 0.0


def test_a_full_queue_is_429_with_retry_after(stage: Stage) -> None:
    full = stage.http_harness.settings.model_copy(update={"predictor_queue": 0})
    context = stage.http_harness.app.state.context
    object.__setattr__(context, "settings", full)
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            stage.openai.completions.create(model=stage.name, prompt="a")
        assert refused.value.response.headers["retry-after"] == "2"
        question = {"model": "large", "task": TASK.model_dump(), "texts": ["a"]}
        assert code(stage.http_harness("alice", "POST", "/v1/predictions", json=question)) == (429, "too_many_requests")
    finally:
        object.__setattr__(context, "settings", stage.http_harness.settings)


def test_the_command_goes_on_with_texts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [stage.plain(text, 6) for text in TEXTS[:2]]
    monkeypatch.setenv("POST_URL", stage.http_harness.url)
    monkeypatch.setenv("POST_API_KEY", stage.http_harness.keys["alice"])
    argv = ["generate", "--model", "large", "--prompt", stage.prompt, "--max-tokens", "6", "--temperature", "0"]
    one = CliRunner().invoke(build_app(), [*argv, "--text", TEXTS[0]])
    assert (one.exit_code, one.stdout) == (0, expected[0] + "\n")
    two = CliRunner().invoke(build_app(), [*argv, "--text", TEXTS[0], "--text", TEXTS[1]])
    assert [json.loads(line)["answer"] for line in two.stdout.splitlines()] == expected
