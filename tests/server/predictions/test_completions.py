"""OpenAI's client against ``/v1/completions``, with a real API server, a real Redis server and the predictor's loop."""

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


class CompletionHarness:
    """The provider side without a worker, with a tiny model, a prompt of Alice's and OpenAI's client."""

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
        step = self.predictor._scheduler.step
        self.predictor._scheduler.step = lambda now: time.sleep(self.pause) or step(now)  # type: ignore[method-assign, func-returns-value]
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=loop, args=(self._stopping,))
            for loop in (self.predictor.heartbeat, self.predictor.serve)
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

    def greedy(self, text: str, max_tokens: int, *, prompted: bool = True) -> str:
        """Greedy generation by Transformers, with the prompt's embeddings prepended."""
        inputs = self.model.embed(torch.tensor([self.model.tokenizer(text).input_ids]))
        if prompted:
            inputs = torch.cat([torch.from_numpy(read_prompt(self.data).embeddings)[None], inputs], 1)
        tokens = self.model.model.generate(
            inputs_embeds=inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        return str(self.model.tokenizer.decode(tokens[0], skip_special_tokens=True))

    def close(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self.predictor.close()
        self.openai.close()
        self.server_harness.close()
        self.http_harness.close()


@pytest.fixture(scope="module")
def harness() -> Iterator[CompletionHarness]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="post-") as home:
        harness = CompletionHarness(Path(home))
        yield harness
        harness.close()


def test_greedy_equals_transformers_for_a_text_and_for_several(harness: CompletionHarness) -> None:
    one = harness.openai.completions.create(model=harness.name, prompt=TEXTS[0], max_tokens=9, temperature=0)
    assert one.choices[0].text == harness.greedy(TEXTS[0], 9)
    assert (one.object, one.model, one.choices[0].finish_reason) == ("text_completion", harness.name, "length")
    assert one.usage is not None
    length = len(harness.model.tokenizer(TEXTS[0]).input_ids)
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.total_tokens) == (length, 9, length + 9)
    many = harness.openai.completions.create(model=harness.name, prompt=TEXTS, max_tokens=7, temperature=0)
    assert [choice.text for choice in many.choices] == [harness.greedy(text, 7) for text in TEXTS]
    bare = harness.openai.completions.create(model="large", prompt=TEXTS[0], max_tokens=9, temperature=0)
    assert bare.choices[0].text == harness.greedy(TEXTS[0], 9, prompted=False) != one.choices[0].text


def test_a_stream_brings_the_same_in_parts(harness: CompletionHarness) -> None:
    body: dict[str, Any] = {
        "model": harness.name,
        "prompt": TEXTS[:3],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 1,
    }
    whole = harness.openai.completions.create(**body)
    texts, reasons, tokens, events = ["", "", ""], {}, [[], [], []], []
    for event in harness.openai.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        events.append(event)
        for choice in event.choices:
            assert choice.index not in reasons, "no event follows the end of a choice"
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens  # type: ignore[union-attr, operator, arg-type]
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]  # type: ignore[union-attr]
    assert set(reasons) == {0, 1, 2}
    assert len(events) > 4, "parts are sent as they are generated"
    assert events[-1].usage == whole.usage
    assert not events[-1].choices
    assert {event.id for event in events} == {events[0].id}


def test_a_stream_ends_like_openais(harness: CompletionHarness) -> None:
    body = {"model": harness.name, "prompt": "nice", "max_tokens": 2, "stream": True}
    answer = harness.http_harness("alice", "POST", "/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: {") for line in lines[:-1])
    assert lines[-1] == "data: [DONE]"


def test_sampled_answers_differ_and_a_seed_repeats_them(harness: CompletionHarness) -> None:
    body: dict[str, Any] = {"model": harness.name, "prompt": TEXTS[:2], "n": 4, "max_tokens": 8, "temperature": 1.5}
    first = harness.openai.completions.create(**body, seed=3)
    again = harness.openai.completions.create(**body, seed=3)
    other = harness.openai.completions.create(**body, seed=4)
    texts = [[choice.text for choice in each.choices] for each in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0][:4])) > 1
    assert [choice.index for choice in first.choices] == list(range(8))
    cold = harness.openai.completions.create(**(body | {"top_p": 0.0}), seed=9)
    assert [choice.text for choice in cold.choices[::4]] == [harness.greedy(text, 8) for text in TEXTS[:2]]


def test_a_stop_string_ends_an_answer_and_is_left_out(harness: CompletionHarness) -> None:
    whole = harness.greedy(TEXTS[1], 12)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    body: dict[str, Any] = {"model": harness.name, "prompt": TEXTS[1], "max_tokens": 12, "temperature": 0}
    choice = harness.openai.completions.create(**body, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    parts = harness.openai.completions.create(**body, stop=["nowhere", stop], stream=True)
    assert "".join(part.choices[0].text for part in parts) == choice.text


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
def test_invalid_options_are_refused(
    harness: CompletionHarness, change: dict[str, Any], words: str, stream: bool
) -> None:
    body = {"model": harness.name, "prompt": "a film", "max_tokens": 2} | change
    with pytest.raises(openai.UnprocessableEntityError, match=words) as refused:
        harness.openai.completions.create(**body, stream=stream)
    assert refused.value.code == "invalid_input"


def test_callers_reach_only_their_own_prompts_and_existing_models(harness: CompletionHarness) -> None:
    other = prompt_bytes(harness.http_harness.add_model("other").hash)
    foreign = harness.http_harness.push("alice", other).json()["id"]
    cases: list[tuple[str, str, type[openai.APIStatusError]]] = [
        ("bob", harness.name, openai.NotFoundError),
        ("alice", "none", openai.NotFoundError),
        ("alice", "large:", openai.NotFoundError),
        ("alice", "large:prm_none", openai.NotFoundError),
        ("alice", f"large:{foreign}", openai.UnprocessableEntityError),
    ]
    for who, model, kind in cases:
        with harness.client(who) as client, pytest.raises(kind):
            client.completions.create(model=model, prompt="a")
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{harness.http_harness.url}/v1", api_key="post_no", max_retries=0).completions.create(
            model="a", prompt="a"
        )
    assert harness.client("provider").completions.create(model=harness.name, prompt="a", max_tokens=1).choices


def test_logprobs_need_the_scope_scores(harness: CompletionHarness) -> None:
    with harness.http_harness.database.write() as session:
        row, key = create_key(session, name="shy", role=Role.OWNER, scopes=[Scope.PREDICT])
    harness.http_harness.add_caller("shy", row, key)
    with harness.client("shy") as client:
        assert client.completions.create(model="large", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.PermissionDeniedError, match="scores"):
            client.completions.create(model="large", prompt="a", max_tokens=1, logprobs=0)


@pytest.mark.parametrize("stream", [False, True])
def test_when_the_caller_disconnects_the_predictor_stops(harness: CompletionHarness, stream: bool) -> None:
    harness.pause = 0.05
    try:
        body = {"model": harness.name, "prompt": "a", "max_tokens": 240, "stream": stream, "logit_bias": None}
        with httpx.Client(
            base_url=harness.http_harness.url, headers={"Authorization": f"Bearer {harness.http_harness.keys['alice']}"}
        ) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=body, timeout=0.5)
        (request,) = harness.predictor._scheduler.requests
        wait_for(lambda: not harness.predictor._scheduler.requests, 8.0)
        assert len(request.texts[0].row.made) < 200
    finally:
        harness.pause = 0.0


def test_a_prediction_does_not_wait_for_a_generation(harness: CompletionHarness) -> None:
    harness.pause = 0.02
    try:
        body = {"model": harness.name, "prompt": ["a", "nice"], "max_tokens": 150, "temperature": 0, "stream": True}
        stream = harness.openai.completions.create(**body)  # type: ignore[call-overload]
        next(iter(stream))
        prediction = {"model": "large", "task": TASK.model_dump(), "texts": TEXTS}
        answer = harness.http_harness("alice", "POST", "/v1/predictions", json=prediction)
        assert len(answer.json()["items"]) == len(TEXTS)
        assert harness.predictor._scheduler.requests, "the stream is still running"
        late = harness.openai.completions.create(model=harness.name, prompt="dull", max_tokens=3, temperature=0)
        assert late.choices[0].text == harness.greedy("dull", 3)
        assert harness.predictor._scheduler.requests, "a short request joins a long one and leaves before its end"
        stream.close()
        wait_for(lambda: not harness.predictor._scheduler.requests, 8.0)
    finally:
        harness.pause = 0.0


def test_a_full_queue_is_429_with_retry_after(harness: CompletionHarness) -> None:
    full = harness.http_harness.settings.model_copy(update={"predictor_queue": 0})
    context = harness.http_harness.app.state.context
    object.__setattr__(context, "settings", full)
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            harness.openai.completions.create(model=harness.name, prompt="a")
        assert refused.value.response.headers["retry-after"] == "2"
        body = {"model": "large", "task": TASK.model_dump(), "texts": ["a"]}
        assert code(harness.http_harness("alice", "POST", "/v1/predictions", json=body)) == (429, "too_many_requests")
    finally:
        object.__setattr__(context, "settings", harness.http_harness.settings)


def test_the_command_generates_text(harness: CompletionHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [harness.greedy(text, 6) for text in TEXTS[:2]]
    monkeypatch.setenv("POST_URL", harness.http_harness.url)
    monkeypatch.setenv("POST_API_KEY", harness.http_harness.keys["alice"])
    argv = ["generate", "--model", "large", "--prompt", harness.prompt, "--max-tokens", "6", "--temperature", "0"]
    one = CliRunner().invoke(build_app(), [*argv, "--text", TEXTS[0]])
    assert (one.exit_code, one.stdout) == (0, expected[0] + "\n")
    two = CliRunner().invoke(build_app(), [*argv, "--text", TEXTS[0], "--text", TEXTS[1]])
    assert [json.loads(line)["answer"] for line in two.stdout.splitlines()] == expected
