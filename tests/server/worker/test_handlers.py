"""A job's results equal those of direct calls; a job that can't succeed fails with its error code."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import func, select

from post_server.db.tables import JobRow, ModelRow, PromptRow
from post_server.jobs import states
from post_server.models.service import add_model, materialise_model, model_facts
from post_server.prompts.service import add_prompt
from post_server.worker import progress
from post_server.worker.job_process import ENDED, INTERRUPTED, LOST, JobProcess
from post_server.worker.progress import ProgressWriter
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.precision import Precision
from post_shared.errors import Cancelled
from post_shared.files.prompt_file import PromptFile, read_prompt, write_prompt
from post_shared.inference.evaluation import evaluate
from post_shared.method.transfer.transfer import choose_alpha, transfer
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.evaluations import EvaluationCreate
from post_shared.schemas.jobs import JobKind, JobState
from post_shared.schemas.models import ModelRole
from post_shared.schemas.prompts import PromptRole
from post_shared.schemas.transfers import TransferCreate
from post_shared.training.progress import Progress
from tests.models import tiny_model
from tests.server.server_harness import PUBLIC, TASK, ServerHarness

ROWS = [Row(text, label) for text, label in PUBLIC]


class KnownStages(dict[str, tuple[float, float]]):
    """The spans of stages, without a default."""

    def get(self, stage: str, default: Any = None) -> Any:
        return self[stage]


@pytest.fixture(autouse=True)
def every_stage_has_its_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage without one would make the progress bar jump; here its job fails."""
    monkeypatch.setattr(progress, "SPANS", KnownStages(progress.SPANS))


def run(server_harness: ServerHarness, job_id: str, *, interrupted: bool = False) -> tuple[int, JobRow]:
    """Run the job in this process, as its own process would."""
    settings = server_harness.settings
    with server_harness.database.write() as session:
        claimed = states.claim(
            session, job_id, lease_seconds=settings.lease_seconds, max_attempts=settings.max_attempts
        )
    assert claimed is not None
    stop = threading.Event()
    if interrupted:
        stop.set()
    return JobProcess(settings, claimed[1], stop).run(), server_harness.job(job_id)


def add_student(server_harness: ServerHarness, target: ModelRow, *, seed: int = 1) -> ModelRow:
    model = tiny_model("llama", layers=2, seed=seed)
    folder = server_harness.settings.home / f"student-{seed}-saved"
    model.save(folder)
    with server_harness.database.write() as session:
        return add_model(
            session,
            server_harness.store,
            folder,
            name=f"student-{seed}",
            role=ModelRole.STUDENT,
            target_id=target.id,
            **model_facts(model),
        )


def load(server_harness: ServerHarness, row: ModelRow, folder: Path) -> LanguageModel:
    return LanguageModel.load(materialise_model(server_harness.store, row, folder / row.id), device="cpu")


def add_transfer(server_harness: ServerHarness, prompt: PromptRow, **more: Any) -> str:
    request = {"prompt": prompt.id, "target": "target", "dataset": "public", "steps": 3, "batch_size": 4}
    document = TransferCreate.model_validate({**request, "max_length": 32, **more})
    return server_harness.add_job(JobKind.TRANSFER, document.model_dump(mode="json"), server_harness.owner)


def add_evaluation(server_harness: ServerHarness, **request: Any) -> str:
    document = EvaluationCreate.model_validate({"model": "target", "dataset": "public", **request})
    return server_harness.add_job(JobKind.EVALUATE, document.model_dump(mode="json"), server_harness.owner)


@pytest.mark.parametrize("alpha", [0.3, "auto"])
def test_a_transfer_job_is_a_transfer(server_harness: ServerHarness, tmp_path: Path, alpha: float | str) -> None:
    target, dataset = server_harness.add_target(), server_harness.add_rows()
    student = add_student(server_harness, target)
    source = server_harness.add_source_prompt(student)
    status, job = run(server_harness, add_transfer(server_harness, source, alpha=alpha))
    assert (status, job.state, job.error) == (ENDED, JobState.SUCCEEDED, None)
    assert job.result is not None
    with server_harness.database.read() as session:
        row = session.get_one(PromptRow, job.result["prompt_id"])
    assert (row.role, row.source_id, row.owner_key_id) == (PromptRole.TARGET, source.id, server_harness.owner.id)
    file = read_prompt(server_harness.store.read(row.sha256))
    assert (file.model_hash, file.task, file.epsilon, file.delta) == (target.hash, TASK, 8.0, 1e-5)

    big, small, task = (
        load(server_harness, target, tmp_path),
        load(server_harness, student, tmp_path),
        Task.from_spec(TASK),
    )
    prompt = SoftPrompt(torch.from_numpy(read_prompt(server_harness.store.read(source.sha256)).embeddings))
    number = choose_alpha(big, small, task, prompt, ROWS) if alpha == "auto" else float(alpha)
    assert job.result["alpha"] == number
    options = TransferCreate.model_validate(job.request).replace(alpha=number)
    expected = transfer(big, small, task, prompt, [row.text for row in ROWS], options)
    assert torch.equal(torch.from_numpy(file.embeddings), expected.prompt.embeddings)
    assert job.result["last_loss"] == expected.last_loss
    assert dataset.rows == len(ROWS)


def test_jobs_run_on_a_target_larger_than_memory(server_harness: ServerHarness) -> None:
    target = server_harness.add_target()
    server_harness.add_rows()
    source = server_harness.add_source_prompt(add_student(server_harness, target))
    _, plain = run(server_harness, add_transfer(server_harness, source))
    server_harness.settings = server_harness.settings.model_copy(
        update={"device": "spread", "device_memory": "cpu=1KB"}
    )
    _, spread = run(server_harness, add_transfer(server_harness, source))
    assert (plain.error, spread.error) == (None, None)
    assert plain.result is not None
    assert spread.result is not None
    assert spread.result["last_loss"] == pytest.approx(plain.result["last_loss"], rel=1e-4)


@pytest.mark.parametrize(("precision", "rounded"), [("auto", True), ("float32", False)])
def test_a_cpu_with_fast_bfloat16_uses_it_unless_disabled(
    server_harness: ServerHarness, monkeypatch: pytest.MonkeyPatch, precision: str, rounded: bool
) -> None:
    target = server_harness.add_target()
    server_harness.add_rows()
    server_harness.add_corpus()
    transfer_job = add_transfer(server_harness, server_harness.add_source_prompt(add_student(server_harness, target)))
    _, plain = run(server_harness, transfer_job)
    bfloat16 = Precision(torch.bfloat16, "a test")
    monkeypatch.setattr("post_shared.model.language_model.choose_precision", lambda *_: bfloat16)
    server_harness.settings = server_harness.settings.model_copy(update={"precision": precision})
    _, again = run(server_harness, server_harness.add_job(JobKind.TRANSFER, plain.request, server_harness.owner))
    _, student = run(server_harness, server_harness.add_distil(steps=2))
    assert (plain.error, again.error, student.error) == (None, None, None)
    assert plain.result is not None
    assert again.result is not None
    assert student.result is not None
    assert (again.result["last_loss"] != plain.result["last_loss"]) is rounded
    says = {"dtype": "bfloat16", "reason": "a test"} if rounded else {"dtype": "float32", "reason": "as asked for"}
    assert (again.result["precision"], student.result["precision"]) == (says, says)


@pytest.mark.parametrize("pattern", ["even", "search"])
def test_a_distillation_reports_the_layers_it_kept_and_tried(server_harness: ServerHarness, pattern: str) -> None:
    server_harness.add_target()
    server_harness.add_corpus()
    more = {
        "layer_pattern": pattern,
        "student_init": "least_squares",
        "gradient_accumulation_steps": 2,
        "alignment": 0.5,
    }
    _, job = run(server_harness, server_harness.add_distil(steps=2, **more))
    assert job.error is None
    assert job.result is not None
    assert "align" in job.metrics
    if pattern == "even":
        assert (job.result["layers"], "tried" in job.result) == ([0, 3], False)
    else:
        tried = job.result["tried"]
        assert tried[0]["layers"] == job.result["layers"]
        assert tried == sorted(tried, key=lambda each: each["cos"])
        assert len(tried) > 1
        assert any(event.data.get("stage") == "search" for event in server_harness.events(job.id))
        assert "best_cos" in job.metrics


@pytest.mark.parametrize("with_prompt", [False, True])
def test_an_evaluation_job_is_an_evaluation(server_harness: ServerHarness, tmp_path: Path, with_prompt: bool) -> None:
    target, _ = server_harness.add_target(), server_harness.add_rows()
    source = server_harness.add_source_prompt(target)
    subject = {"prompt": source.id} if with_prompt else {"task": TASK.model_dump()}
    _, job = run(server_harness, add_evaluation(server_harness, **subject))
    prompt = torch.from_numpy(read_prompt(server_harness.store.read(source.sha256)).embeddings)
    expected = evaluate(
        load(server_harness, target, tmp_path), Task.from_spec(TASK), ROWS, prompt if with_prompt else None
    )
    assert job.result == {"accuracy": expected.accuracy, "rows": expected.rows, "recall": expected.recall}


def test_a_masked_model_is_evaluated_with_a_prompt(server_harness: ServerHarness) -> None:
    target, _ = server_harness.add_target(family="bert"), server_harness.add_rows()
    source = server_harness.add_source_prompt(target)
    _, job = run(server_harness, add_evaluation(server_harness, prompt=source.id))
    assert job.state is JobState.SUCCEEDED, job.error
    assert job.result is not None
    assert job.result["rows"] == len(ROWS)


def test_a_damaged_model_fails_without_revealing_paths(server_harness: ServerHarness) -> None:
    target, _ = server_harness.add_target(), server_harness.add_rows()
    config = next(file["sha256"] for file in target.files if file["path"] == "config.json")
    path = server_harness.store.local_path(config)
    path.chmod(0o600)
    path.write_text("{}")
    _, job = run(server_harness, add_evaluation(server_harness, task=TASK.model_dump()))
    assert job.error is not None
    assert job.error["code"] == "integrity_error"
    assert str(server_harness.settings.home) not in str(job.error)


def test_outputs_that_are_nan_give_no_accuracy(server_harness: ServerHarness) -> None:
    target, _ = server_harness.add_target(family="gpt2"), server_harness.add_rows()
    vectors = np.full((2, target.hidden_size), 3e38, dtype=np.float32)
    data = write_prompt(PromptFile(vectors, target.hash, TASK))
    with server_harness.database.write() as session:
        row, _ = add_prompt(
            session, server_harness.store, data, role=PromptRole.SOURCE, owner_key_id=server_harness.owner.id
        )
    _, job = run(server_harness, add_evaluation(server_harness, prompt=row.id))
    assert job.error is not None
    assert (job.error["code"], "NaN or infinite" in job.error["detail"]) == ("invalid_input", True)


REFUSED = {
    "no such dataset": (lambda b: add_evaluation(b, dataset="other", task=TASK.model_dump()), "not_found"),
    "no such model": (lambda b: add_evaluation(b, model="other", task=TASK.model_dump()), "not_found"),
    "neither prompt nor task": (add_evaluation, "invalid_input"),
    "a corpus has no labels": (
        lambda b: add_evaluation(b, dataset="corpus", task=TASK.model_dump()),
        "invalid_input",
    ),
    "other labels": (
        lambda b: add_evaluation(b, task={"template": "{text}", "label_words": {"a": ["good"], "b": ["bad"]}}),
        "invalid_input",
    ),
    "label words of several tokens": (
        lambda b: add_evaluation(
            b,
            task={
                "template": "{text}, it was",
                "label_words": {"positive": ["extraordinary"], "negative": ["bad"]},
            },
        ),
        "task_invalid",
    ),
    "a target model can't be a student's name": (lambda b: b.add_distil(steps=1, name="target"), "conflict"),
    "more layers than the target has": (lambda b: b.add_distil(steps=1, keep_layers=[0, 99]), "invalid_input"),
    "a transfer of a target prompt": (
        lambda b: add_transfer(b, _target_prompt(b)),
        "not_found",
    ),
    "a prompt of another model's student": (lambda b: add_transfer(b, _foreign_prompt(b)), "prompt_mismatch"),
}


def _target_prompt(server_harness: ServerHarness) -> PromptRow:
    with server_harness.database.write() as session:
        target = session.scalars(select(ModelRow).where(ModelRow.name == "target")).one()
    row = server_harness.add_source_prompt(target)
    with server_harness.database.write() as session:
        session.get_one(PromptRow, row.id).role = PromptRole.TARGET
    return row


def _foreign_prompt(server_harness: ServerHarness) -> PromptRow:
    other = server_harness.add_target(name="other-target", layers=3)
    return server_harness.add_source_prompt(add_student(server_harness, other, seed=7))


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_jobs_fail_with_their_code_and_leave_no_rows(server_harness: ServerHarness, case: str) -> None:
    server_harness.add_target()
    server_harness.add_rows()
    server_harness.add_corpus()
    add_job, code = REFUSED[case]
    job_id = add_job(server_harness)

    def count() -> tuple[int | None, ...]:
        with server_harness.database.read() as session:
            return tuple(session.scalar(select(func.count()).select_from(each)) for each in (ModelRow, PromptRow))

    before = count()
    status, job = run(server_harness, job_id)
    assert (status, job.state) == (ENDED, JobState.FAILED)
    assert job.error is not None
    assert job.error["code"] == code
    assert count() == before


def test_a_process_without_the_lease_does_nothing(server_harness: ServerHarness) -> None:
    job_id = server_harness.add_distil(steps=1)
    with server_harness.database.write() as session:
        states.claim(session, job_id, lease_seconds=30, max_attempts=3)
    process = JobProcess(server_harness.settings, states.Lease(job_id, "stale"), threading.Event())
    assert process.run() == LOST
    assert server_harness.job(job_id).state is JobState.RUNNING


def test_an_interrupted_job_leaves_its_state_to_the_supervisor(server_harness: ServerHarness) -> None:
    server_harness.add_target()
    server_harness.add_corpus()
    status, job = run(server_harness, server_harness.add_distil(steps=5), interrupted=True)
    assert (status, job.state) == (INTERRUPTED, JobState.RUNNING)


def test_progress_is_written_rarely_and_without_nan(server_harness: ServerHarness) -> None:
    job_id = server_harness.add_distil(steps=1)
    with server_harness.database.write() as session:
        claimed = states.claim(session, job_id, lease_seconds=30, max_attempts=3)
    assert claimed is not None
    stop = threading.Event()

    def stop_if_interrupted() -> None:
        if stop.is_set():
            raise Cancelled("stop")

    on_progress = ProgressWriter(server_harness.database, claimed[1], stop_if_interrupted)
    for step in range(1, 1001):
        on_progress(Progress(step, 2000, "distil", {"loss": float("nan"), "ce": 1.0}))
    kinds = [event.kind for event in server_harness.events(job_id)]
    assert kinds.count("progress") <= 4
    assert server_harness.job(job_id).metrics == {"ce": 1.0}
    on_progress(Progress(2000, 2000, "distil", {}))
    assert server_harness.job(job_id).progress == pytest.approx(0.98)
    stop.set()
    with pytest.raises(Cancelled):
        on_progress(Progress(1, 2, "distil", {}))
