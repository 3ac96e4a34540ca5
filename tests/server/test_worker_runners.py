"""What a job makes equals what the plain functions make; what can't work fails with a code that says why."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import func, select

from post_server.jobs import states
from post_server.ml.transfer import TransferConfig, choose_alpha, transfer
from post_server.model_store import add_model, materialise_model, model_facts
from post_server.prompt_store import add_prompt
from post_server.records import JobRow, ModelRow, PromptRow
from post_server.worker.process import ENDED, INTERRUPTED, LOST, JobProcess
from post_server.worker.reporter import JobReporter
from post_shared.data import Row
from post_shared.errors import Cancelled
from post_shared.evaluation import evaluate
from post_shared.language_model import LanguageModel
from post_shared.prompt_file import PromptFile, read_prompt, write_prompt
from post_shared.schemas import EvaluationCreate, JobKind, JobState, ModelRole, PromptRole, TransferCreate
from post_shared.soft_prompt import SoftPrompt
from post_shared.tasks import Task
from post_shared.training import Progress
from tests.models import tiny_model
from tests.server.backstage import PUBLIC, TASK, Backstage

ROWS = [Row(text, label) for text, label in PUBLIC]


def run(backstage: Backstage, job_id: str, *, interrupted: bool = False) -> tuple[int, JobRow]:
    """The job in this process, as its own process would do it."""
    settings = backstage.settings
    with backstage.database.write() as session:
        found = states.claim(session, job_id, lease_seconds=settings.lease_seconds, max_attempts=settings.max_attempts)
    assert found is not None
    told = threading.Event()
    if interrupted:
        told.set()
    return JobProcess(settings, found[1], told).run(), backstage.job(job_id)


def add_student(backstage: Backstage, target: ModelRow, *, seed: int = 1) -> ModelRow:
    model = tiny_model("llama", layers=2, seed=seed)
    folder = backstage.settings.home / f"student-{seed}-saved"
    model.save(folder)
    with backstage.database.write() as session:
        return add_model(
            session,
            backstage.store,
            folder,
            name=f"student-{seed}",
            role=ModelRole.STUDENT,
            target_id=target.id,
            **model_facts(model),
        )


def load(backstage: Backstage, row: ModelRow, folder: Path) -> LanguageModel:
    return LanguageModel.load(materialise_model(backstage.store, row, folder / row.id), device="cpu")


def add_transfer(backstage: Backstage, prompt: PromptRow, **more: Any) -> str:
    request = {"prompt": prompt.id, "target": "target", "dataset": "public", "steps": 3, "batch_size": 4}
    document = TransferCreate.model_validate({**request, "max_length": 32, **more})
    return backstage.add_job(JobKind.TRANSFER, document.model_dump(mode="json"), backstage.owner)


def add_evaluation(backstage: Backstage, **request: Any) -> str:
    document = EvaluationCreate.model_validate({"model": "target", "dataset": "public", **request})
    return backstage.add_job(JobKind.EVALUATE, document.model_dump(mode="json"), backstage.owner)


@pytest.mark.parametrize("alpha", [0.3, "auto"])
def test_a_transfer_job_is_a_transfer(backstage: Backstage, tmp_path: Path, alpha: float | str) -> None:
    target, dataset = backstage.add_target(), backstage.add_rows()
    student = add_student(backstage, target)
    source = backstage.add_source_prompt(student)
    status, job = run(backstage, add_transfer(backstage, source, alpha=alpha))
    assert (status, job.state, job.error) == (ENDED, JobState.SUCCEEDED, None)
    assert job.result is not None
    with backstage.database.read() as session:
        made = session.get_one(PromptRow, job.result["prompt_id"])
    assert (made.role, made.source_id, made.owner_key_id) == (PromptRole.TARGET, source.id, backstage.owner.id)
    file = read_prompt(backstage.store.read(made.sha256))
    assert (file.model_hash, file.task, file.epsilon, file.delta) == (target.hash, TASK, 8.0, 1e-5)

    big, small, task = load(backstage, target, tmp_path), load(backstage, student, tmp_path), Task.from_form(TASK)
    prompt = SoftPrompt(torch.from_numpy(read_prompt(backstage.store.read(source.sha256)).embeddings))
    number = choose_alpha(big, small, task, prompt, ROWS) if alpha == "auto" else float(alpha)
    assert job.result["alpha"] == number
    config = TransferConfig.from_request(TransferCreate.model_validate(job.request), number)
    expected = transfer(big, small, task, prompt, [row.text for row in ROWS], config)
    assert torch.equal(torch.from_numpy(file.embeddings), expected.prompt.embeddings)
    assert job.result["last_loss"] == expected.last_loss
    assert dataset.rows == len(ROWS)


def test_jobs_run_on_a_target_that_is_larger_than_the_memory(backstage: Backstage) -> None:
    target = backstage.add_target()
    backstage.add_rows()
    source = backstage.add_source_prompt(add_student(backstage, target))
    _, plain = run(backstage, add_transfer(backstage, source))
    backstage.settings = backstage.settings.model_copy(update={"device": "spread", "device_memory": "cpu=1KB"})
    _, spread = run(backstage, add_transfer(backstage, source))
    assert (plain.error, spread.error) == (None, None)
    assert plain.result is not None
    assert spread.result is not None
    assert spread.result["last_loss"] == pytest.approx(plain.result["last_loss"], rel=1e-4)


@pytest.mark.parametrize(("precision", "rounded"), [("auto", True), ("float32", False)])
def test_a_cpu_made_for_bfloat16_is_used_so_unless_told_not_to(
    backstage: Backstage, monkeypatch: pytest.MonkeyPatch, precision: str, rounded: bool
) -> None:
    target = backstage.add_target()
    backstage.add_rows()
    backstage.add_corpus()
    transfer_job = add_transfer(backstage, backstage.add_source_prompt(add_student(backstage, target)))
    _, plain = run(backstage, transfer_job)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr("post_shared.devices.WIDE", 1)
    backstage.settings = backstage.settings.model_copy(update={"precision": precision})
    _, again = run(backstage, backstage.add_job(JobKind.TRANSFER, plain.request, backstage.owner))
    _, student = run(backstage, backstage.add_distil(steps=2))
    assert (plain.error, again.error, student.error) == (None, None, None)
    assert plain.result is not None
    assert again.result is not None
    assert (again.result["last_loss"] != plain.result["last_loss"]) is rounded


@pytest.mark.parametrize("pattern", ["even", "search"])
def test_a_distillation_says_which_layers_it_kept_and_what_it_tried(backstage: Backstage, pattern: str) -> None:
    backstage.add_target()
    backstage.add_corpus()
    more = {"layer_pattern": pattern, "start": "fold", "accumulate": 2, "alignment": 0.5}
    _, job = run(backstage, backstage.add_distil(steps=2, **more))
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
        assert any(event.data.get("stage") == "search" for event in backstage.events(job.id))
        assert "best_cos" in job.metrics


@pytest.mark.parametrize("with_prompt", [False, True])
def test_an_evaluation_job_is_an_evaluation(backstage: Backstage, tmp_path: Path, with_prompt: bool) -> None:
    target, _ = backstage.add_target(), backstage.add_rows()
    source = backstage.add_source_prompt(target)
    asked = {"prompt": source.id} if with_prompt else {"task": TASK.model_dump()}
    _, job = run(backstage, add_evaluation(backstage, **asked))
    prompt = torch.from_numpy(read_prompt(backstage.store.read(source.sha256)).embeddings)
    expected = evaluate(load(backstage, target, tmp_path), Task.from_form(TASK), ROWS, prompt if with_prompt else None)
    assert job.result == {"accuracy": expected.accuracy, "rows": expected.rows, "recall": expected.recall}


def test_a_masked_model_is_evaluated_with_a_prompt(backstage: Backstage) -> None:
    target, _ = backstage.add_target(family="bert"), backstage.add_rows()
    source = backstage.add_source_prompt(target)
    _, job = run(backstage, add_evaluation(backstage, prompt=source.id))
    assert job.state is JobState.SUCCEEDED, job.error
    assert job.result is not None
    assert job.result["rows"] == len(ROWS)


def test_a_damaged_model_fails_without_the_providers_paths(backstage: Backstage) -> None:
    target, _ = backstage.add_target(), backstage.add_rows()
    config = next(file["sha256"] for file in target.files if file["path"] == "config.json")
    place = backstage.store.local_path(config)
    place.chmod(0o600)
    place.write_text("{}")
    _, job = run(backstage, add_evaluation(backstage, task=TASK.model_dump()))
    assert job.error is not None
    assert job.error["code"] == "integrity_error"
    assert str(backstage.settings.home) not in str(job.error)


def test_answers_that_are_no_numbers_are_no_accuracy(backstage: Backstage) -> None:
    target, _ = backstage.add_target(family="gpt2"), backstage.add_rows()
    vectors = np.full((2, target.hidden_size), 3e38, dtype=np.float32)
    data = write_prompt(PromptFile(vectors, target.hash, TASK))
    with backstage.database.write() as session:
        kept, _ = add_prompt(session, backstage.store, data, role=PromptRole.SOURCE, owner_key_id=backstage.owner.id)
    _, job = run(backstage, add_evaluation(backstage, prompt=kept.id))
    assert job.error is not None
    assert (job.error["code"], "no numbers" in job.error["detail"]) == ("invalid_input", True)


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
    "more layers than there are": (lambda b: b.add_distil(steps=1, keep_layers=[0, 99]), "invalid_input"),
    "a transfer of a target prompt": (
        lambda b: add_transfer(b, _target_prompt(b)),
        "not_found",
    ),
    "a prompt of another model's student": (lambda b: add_transfer(b, _foreign_prompt(b)), "prompt_mismatch"),
}


def _target_prompt(backstage: Backstage) -> PromptRow:
    with backstage.database.write() as session:
        target = session.scalars(select(ModelRow).where(ModelRow.name == "target")).one()
    row = backstage.add_source_prompt(target)
    with backstage.database.write() as session:
        session.get_one(PromptRow, row.id).role = PromptRole.TARGET
    return row


def _foreign_prompt(backstage: Backstage) -> PromptRow:
    other = backstage.add_target(name="other-target", layers=3)
    return backstage.add_source_prompt(add_student(backstage, other, seed=7))


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_fails_with_its_code_and_leaves_nothing(backstage: Backstage, what: str) -> None:
    backstage.add_target()
    backstage.add_rows()
    backstage.add_corpus()
    make, code = REFUSED[what]
    job_id = make(backstage)

    def count() -> tuple[int | None, ...]:
        with backstage.database.read() as session:
            return tuple(session.scalar(select(func.count()).select_from(each)) for each in (ModelRow, PromptRow))

    before = count()
    status, job = run(backstage, job_id)
    assert (status, job.state) == (ENDED, JobState.FAILED)
    assert job.error is not None
    assert job.error["code"] == code
    assert count() == before


def test_a_process_without_the_lease_does_nothing(backstage: Backstage) -> None:
    job_id = backstage.add_distil(steps=1)
    with backstage.database.write() as session:
        states.claim(session, job_id, lease_seconds=30, max_attempts=3)
    process = JobProcess(backstage.settings, states.Lease(job_id, "stale"), threading.Event())
    assert process.run() == LOST
    assert backstage.job(job_id).state is JobState.RUNNING


def test_an_interrupted_job_leaves_its_end_to_the_supervisor(backstage: Backstage) -> None:
    backstage.add_target()
    backstage.add_corpus()
    status, job = run(backstage, backstage.add_distil(steps=5), interrupted=True)
    assert (status, job.state) == (INTERRUPTED, JobState.RUNNING)


def test_reports_are_few_and_have_no_nan(backstage: Backstage) -> None:
    job_id = backstage.add_distil(steps=1)
    with backstage.database.write() as session:
        found = states.claim(session, job_id, lease_seconds=30, max_attempts=3)
    assert found is not None
    stop = threading.Event()

    def stop_if_told() -> None:
        if stop.is_set():
            raise Cancelled("stop")

    report = JobReporter(backstage.database, found[1], stop_if_told)
    for step in range(1, 1001):
        report(Progress(step, 2000, "distil", {"loss": float("nan"), "ce": 1.0}))
    kinds = [event.kind for event in backstage.events(job_id)]
    assert kinds.count("progress") <= 4
    assert backstage.job(job_id).metrics == {"ce": 1.0}
    report(Progress(2000, 2000, "distil", {}))
    assert backstage.job(job_id).progress == pytest.approx(0.98)
    stop.set()
    with pytest.raises(Cancelled):
        report(Progress(1, 2, "distil", {}))
