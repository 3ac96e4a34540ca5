"""A provider that tries to learn about private rows with its student, its tokenizer or its responses must fail."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn

from post_client import Client
from post_client.http.session import MAX_RETRY_WAIT
from post_client.privacy import PrivacyConfig, PrivacyPlan
from post_client.students.checks import check_keeps_no_state, load_student
from post_client.tuning.tune import encode_private, tune
from post_shared.cli.app import build_app, print_error, run
from post_shared.data.batches import Batch, EncodedRows
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.precision import Precision
from post_shared.errors import InvalidInput, ModelUnsafe, OutOfMemory, Unavailable, from_problem
from post_shared.files.model_folder import check_safe
from post_shared.method.tuning.tune import tuning_objective
from post_shared.model import memory_plan
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.tuning import TuneOptions
from tests.models import CAUSAL, LABELS, MASKED, TEXTS, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad",), "positive": ("good",)})
ROWS = [Row(text, label) for text, label in zip(TEXTS, LABELS, strict=True)]
CONFIG = TuneOptions(num_virtual_tokens=4, steps=4, batch_size=8)
PRIVACY = PrivacyConfig(epsilon=8)


def trapped_student(word: str) -> LanguageModel:
    """A student whose output for any text with ``word`` is NaN."""
    model = tiny_model("gpt2", layers=2)
    model.model.lm_head.weight = nn.Parameter(model.model.lm_head.weight.detach().clone(), requires_grad=False)
    token = model.tokenizer(word, add_special_tokens=False).input_ids[0]
    model.model.get_input_embeddings().weight.data[token] = torch.nan
    return model


@pytest.mark.parametrize("rows", [[*ROWS, Row("Q", "positive")], [Row("Q", label) for label in TASK.labels]])
def test_whether_a_private_run_ends_does_not_depend_on_a_row(rows: list[Row]) -> None:
    """Otherwise a missing prompt would reveal the row, whatever ε is."""
    result = tune(trapped_student("Q"), TASK, rows, CONFIG, privacy=PRIVACY)
    assert torch.isfinite(result.prompt.embeddings).all()


def test_without_privacy_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="not finite"):
        tune(trapped_student("Q"), TASK, [*ROWS, Row("Q", "positive")], CONFIG, privacy=None)


def test_tokens_that_the_student_cannot_embed_are_refused_whether_a_row_has_them_or_not() -> None:
    model = tiny_model("llama", layers=2)
    model.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ModelUnsafe, match="embeds only"):
        tune(model, TASK, ROWS, CONFIG, privacy=PRIVACY)


def test_a_private_row_changes_no_other_row_before_it_is_clipped() -> None:
    """A long answer once reduced the tokens of all texts: a single row changed every gradient."""
    model, task = tiny_model("gpt2", layers=2), Task("{text} Answer:")
    rows = [Row("the plot was dull and the story is boring and the film was fine", "dull"), Row("nice", "good")]
    config = TuneOptions(num_virtual_tokens=4, max_length=24)
    without = encode_private(model, task, rows, config)
    with_long_answer = encode_private(model, task, [*rows, Row("a film", " ".join(["good"] * 12))], config)
    assert with_long_answer.rows[: len(rows)] == without.rows
    assert max(len(row.token_ids) for row in with_long_answer.rows) <= 24


def _rope(kind: str, **more: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


HALF = 4
"""Half of a head's width in the tiny models."""
LENGTH_DEPENDENT: dict[str, dict[str, object]] = {
    "sees padding": {"is_causal": False},
    "positions by length": _rope(
        "longrope",
        factor=8.0,
        original_max_position_embeddings=20,
        short_factor=[1.0] * HALF,
        long_factor=[9.0] * HALF,
    ),
}


@pytest.mark.parametrize("change", LENGTH_DEPENDENT.values(), ids=LENGTH_DEPENDENT)
@pytest.mark.parametrize("unit", ["row", "user"])
def test_a_row_moves_the_sum_by_c_whatever_a_student_does_with_padding_and_lengths(
    change: dict[str, object], unit: str, tmp_path: Path
) -> None:
    """Every row runs alone and unpadded."""
    tiny_model("llama", layers=2).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    student = LanguageModel.load(tmp_path, device="cpu")
    prompt = SoftPrompt.random(student, 4, seed=1).embeddings
    privacy = PrivacyConfig(seed=0, unit=unit, max_grad_norm=0.1)
    many = [
        Row(" ".join(["plot", text] * (1 + at % 3)), label)
        for at, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True))
    ]
    for more in range(1, 30, 4):
        rows = [*many, Row("plot " * (8 + more), "positive")]
        encoded = encode_private(student, TASK, rows, TuneOptions(num_virtual_tokens=4, max_length=64))

        def summed(count: int, encoded: EncodedRows = encoded) -> torch.Tensor:
            plan = PrivacyPlan.make(privacy, 100, batch_size=8, steps=1)
            tuned = plan.optimizer(nn.Parameter(prompt.clone()), 0.1, range(len(encoded)))
            tuned.update(tuning_objective(student, TASK), encoded.batch(range(count)))
            return tuned.summed_gradient.clone()

        assert float((summed(len(rows)) - summed(len(many))).norm()) <= 0.1 * (1 + 1e-6)


def test_every_row_reaches_the_student_alone_and_unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    student, shapes = tiny_model("llama", layers=2), list[tuple[int, ...]]()
    answer = LanguageModel.answer_logits

    def seen(self: LanguageModel, batch: Batch, *given: Any, **named: Any) -> torch.Tensor:
        shapes.append(tuple(batch.token_ids.shape))
        return answer(self, batch, *given, **named)

    encoded = encode_private(student, TASK, ROWS, CONFIG)
    plan = PrivacyPlan.make(PRIVACY, 100, batch_size=8, steps=1)
    tuned = plan.optimizer(nn.Parameter(SoftPrompt.random(student, 4).embeddings), 0.1)
    monkeypatch.setattr(LanguageModel, "answer_logits", seen)
    tuned.update(tuning_objective(student, TASK), encoded.whole)
    assert shapes == [(1, len(row.token_ids)) for row in encoded.rows]


def test_a_student_that_keeps_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer changed in a forward pass would carry one row into the gradients of the next."""
    student = tiny_model("llama", layers=2)
    student.model.register_buffer("seen", torch.zeros(()), persistent=False)
    student.model.register_forward_pre_hook(lambda *_: student.model.seen.add_(1))
    with pytest.raises(ModelUnsafe, match="texts that it has seen before"):
        tune(student, TASK, ROWS, CONFIG, privacy=PRIVACY)


def test_a_tokenizer_with_dropout_is_refused() -> None:
    student = tiny_model("llama", layers=2)
    student.tokenizer.backend_tokenizer.model.dropout = 0.3
    with pytest.raises(ModelUnsafe, match="dropout"):
        tune(student, TASK, ROWS, CONFIG, privacy=PRIVACY)


def test_dynamic_rope_scaling_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", layers=2).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | _rope("dynamic", factor=2.0)))
    with pytest.raises(ModelUnsafe, match="dynamic rope scaling"):
        tune(LanguageModel.load(tmp_path, device="cpu"), TASK, ROWS, CONFIG, privacy=PRIVACY)


def test_whether_a_private_run_begins_does_not_depend_on_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_model("llama", layers=2)
    each = memory_plan.saved_per_position(student)
    for reserved, begins in ((40, True), (30, False)):
        monkeypatch.setattr(
            memory_plan, "free_bytes", lambda _, reserved=reserved: int((reserved + 0.5) * each / memory_plan.SHARE)
        )
        for rows in (ROWS, [*ROWS, Row("plot " * 100, "positive")]):
            run = partial(tune, student, TASK, rows, CONFIG.replace(max_length=36), privacy=PRIVACY)
            if begins:
                run()
            else:
                with pytest.raises(OutOfMemory):
                    run()


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_sound_students_of_every_family_pass(family: str) -> None:
    student = tiny_model(family)
    check_keeps_no_state(student, SoftPrompt.random(student, 4).embeddings, 64)


def test_a_private_run_needs_a_student_in_float32(tmp_path: Path) -> None:
    student = tiny_model()
    student.save(tmp_path)
    student.model.to(torch.bfloat16)
    with pytest.raises(InvalidInput, match="float32, not bfloat16"):
        check_keeps_no_state(student, SoftPrompt.random(student, 4).embeddings, 16)
    with pytest.MonkeyPatch.context() as patch:  # as on a machine with bfloat16 matrix units
        patch.setattr(
            "post_shared.model.language_model.choose_precision", lambda *_: Precision(torch.bfloat16, "a test")
        )
        assert load_student(tmp_path, "cpu").dtype == torch.float32
        assert load_student(tmp_path, "cpu", private=False).dtype == torch.bfloat16


@pytest.mark.parametrize("member", ["_attn_implementation_internal", "_experts_implementation_internal"])
def test_a_kernel_to_fetch_is_refused_under_its_internal_name_too(member: str, tmp_path: Path) -> None:
    tiny_model("llama", layers=1).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {member: "someone/kernel"}))
    with pytest.raises(ModelUnsafe, match="code to fetch"):
        check_safe(tmp_path)


@pytest.mark.parametrize(
    ("file", "member", "value"),
    [("config.json", "dtype", "nothing"), ("tokenizer_config.json", "tokenizer_class", "BertJapaneseTokenizer")],
)
def test_a_folder_that_does_not_load_is_a_typed_error(file: str, member: str, value: str, tmp_path: Path) -> None:
    tiny_model("llama", layers=1).save(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {member: value}))
    with pytest.raises(InvalidInput, match="can't load"):
        LanguageModel.load(tmp_path, device="cpu")


@pytest.mark.parametrize("retry_after", ["soon", [], {}, -1, 1e400, None, 1e9])
def test_no_response_makes_the_client_wait_forever_or_crash(
    retry_after: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("post_client.http.transports.time.sleep", waited.append)
    problem = json.dumps({"code": "unavailable", "detail": "away", "retry_after": retry_after})
    headers = {"Content-Type": "application/problem+json"}
    transport = httpx.MockTransport(lambda request: httpx.Response(503, headers=headers, content=problem))
    with pytest.raises(Unavailable, match="away"):
        Client(url="http://provider.example", api_key="key", attempts=2, transport=transport).ready()
    assert len(waited) == 1
    assert 0 <= waited[0] <= MAX_RETRY_WAIT


def test_no_response_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(
        from_problem({"code": "not_found", "detail": "gone \x1b]0;owned\x07\x1b[2J\u202e é", "request_id": "\x1b["})
    )
    shown = capsys.readouterr().err
    assert "gone" in shown
    assert "é" in shown
    assert all(each.isprintable() for each in shown.rstrip("\n"))


@pytest.mark.parametrize("option", ["--out", "--statement", "--checkpoint", "--data"])
def test_the_owners_files_are_refused_in_the_students_folder(option: str, tmp_path: Path) -> None:
    inside = str(tmp_path / "student" / "down" / ".." / "it.json")
    paths = {"--data": "rows.jsonl", "--out": "prompt.safetensors", "--checkpoint": "kept"} | {option: inside}
    options = [argument for pair in paths.items() for argument in pair]
    student = tmp_path / "student"
    assert run(build_app(), ["tune", "--student", str(student), "--task", "reviews", *options]) == 2
    assert not student.exists()
