"""Properties of the trade-off report, from its parts to the finished job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from post_server.db.tables import JobRow, ModelRow
from post_server.reports.figures import measured_loss
from post_server.reports.texts import attacked_texts, split_task
from post_server.reports.trade_off import TradeOff, trade_off
from post_shared.data.batches import Batch
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import Cancelled, DataInvalid
from post_shared.inference.evaluation import evaluate
from post_shared.method.audit import roc
from post_shared.method.audit.min_k import SHARES, text_scores
from post_shared.method.transfer.baselines import calibrated_scores
from post_shared.model import memory_plan
from post_shared.model.language_model import LanguageModel
from post_shared.model.memory_plan import saved_per_position
from post_shared.schemas.datasets import DatasetKind
from post_shared.schemas.jobs import JobKind, JobState
from post_shared.schemas.reports import ReportCreate, TradeOffReport
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, tiny_model
from tests.server.server_harness import TASK, ServerHarness
from tests.server.worker.test_handlers import add_student, run
from tests.shared.method.audit.test_min_k import texts

CLASSIFICATION = Task.from_spec(TASK)
ROWS = [Row(f"{text}, {number}", label) for number in range(5) for text, label in zip(TEXTS, LABELS, strict=True)]
REQUEST = ReportCreate.model_validate(
    {
        "student": "student-1",
        "tasks": [{"dataset": "public", "task": TASK.model_dump()}],
        "members": ["seen"],
        "non_members": ["unseen"],
        "tuning": {"steps": 4, "batch_size": 4, "num_virtual_tokens": 2, "max_length": 32},
    }
)
STEPS = 150
"""Steps of a tuning that is to be killed."""
LONG = {**REQUEST.tuning.model_dump(mode="json"), "steps": STEPS}
MEMBERS, OTHERS = texts(24, 1), texts(24, 2)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roc, "RESAMPLES", 100)


def measure(student: LanguageModel, target: LanguageModel | None = None, **options: Any) -> TradeOff:
    target = target or tiny_model(layers=4)
    task = split_task("public", CLASSIFICATION, ROWS, REQUEST)
    sides = attacked_texts(target, MEMBERS, OTHERS, REQUEST)
    return trade_off(target, student, [task], *sides, REQUEST, **options)


def test_a_student_equal_to_its_target_has_no_gap_and_leaks_as_much() -> None:
    result = measure(tiny_model(layers=4))
    (task,) = result.tasks
    assert (task.gap.value, task.gap.low, task.gap.high) == (0.0, 0.0, 0.0)
    assert task.target_tuned == task.student_tuned
    assert (result.loss.ce, result.loss.cos) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5))
    assert len(result.leakage) == 2 * len(SHARES)
    for leakage in result.leakage:
        assert leakage.target == leakage.student
        assert (leakage.auc_drop.low, leakage.auc_drop.high) == (0.0, 0.0)
        assert leakage.target.auc.low < 0.5 < leakage.target.auc.high  # random weights were trained on neither side


def test_the_figures_equal_those_of_the_plain_functions() -> None:
    target, student = tiny_model(layers=4), tiny_model(layers=2, seed=1)
    result = measure(student, target)
    task, (figures,) = split_task("public", CLASSIFICATION, ROWS, REQUEST), result.tasks
    assert (figures.tune_rows, figures.test_rows) == (len(task.tune), len(task.test)) == (20, 20)
    assert figures.target_zero_shot.value == pytest.approx(
        evaluate(target, CLASSIFICATION, task.test, max_length=32).accuracy
    )
    assert figures.student_zero_shot.value == pytest.approx(
        evaluate(student, CLASSIFICATION, task.test, max_length=32).accuracy
    )
    assert figures.gap.value == pytest.approx(figures.target_tuned.value - figures.student_tuned.value)
    assert figures.gap_zero_shot.value == pytest.approx(figures.target_zero_shot.value - figures.student_tuned.value)
    scores = calibrated_scores(
        target, CLASSIFICATION, [row.text for row in task.test], [row.text for row in task.tune], max_length=32
    )
    guesses = [CLASSIFICATION.labels[guess] for guess in scores.argmax(-1).tolist()]
    right = [guess == row.label for guess, row in zip(guesses, task.test, strict=True)]
    assert figures.target_calibrated is not None
    assert figures.gap_calibrated is not None
    assert figures.target_calibrated.value == pytest.approx(sum(right) / len(right))
    assert figures.gap_calibrated.value == pytest.approx(sum(right) / len(right) - figures.student_tuned.value)
    labels = [row.label for row in task.test]
    assert figures.majority == max(map(labels.count, labels)) / 20
    likelihood = text_scores(student, OTHERS, 32, shares=[1.0])[:, 0, 0]
    lengths = torch.tensor([len(student.tokenizer(text).input_ids) - 1 for text in OTHERS])
    lengths = lengths.clamp(max=31).double()
    assert result.loss.tokens == int(lengths.sum())
    assert result.loss.lm == pytest.approx(-float((likelihood * lengths).sum() / lengths.sum()), rel=1e-4)


def test_tuning_for_a_report_fits_into_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    target, student = tiny_model(layers=4), tiny_model()
    sizes: list[int] = []
    run = LanguageModel.answer_logits

    def recorded(self: LanguageModel, batch: Batch, *inputs: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled():
            sizes.append(len(batch))
        return run(self, batch, *inputs, **options)

    monkeypatch.setattr(LanguageModel, "answer_logits", recorded)
    measure(student, target)
    with_ample_memory = len(sizes)
    sizes.clear()
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: int(500 * saved_per_position(target) / memory_plan.SHARE))
    measure(student, target)
    assert len(sizes) > with_ample_memory


def test_a_masked_pair_is_measured_too() -> None:
    target, student = tiny_model("bert"), tiny_model("bert", layers=2, seed=1)
    result = measure(student, target)
    assert result.loss.ce > 0
    assert all(0 <= leakage.student.auc.value <= 1 for leakage in result.leakage)
    assert measured_loss(target, target, OTHERS[:2], 32)["ce"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("stop_at", [0.05, 0.3, 0.6, 0.95])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stop_at: float) -> None:
    student = tiny_model(layers=2, seed=1)
    seen: list[float] = []

    def stop(progress: Progress) -> None:
        seen.append(progress.step / progress.steps)
        if seen[-1] >= stop_at:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        measure(student, on_progress=stop, checkpoint=tmp_path)
    later: list[float] = []
    resumed = measure(student, on_progress=lambda p: later.append(p.step / p.steps), checkpoint=tmp_path)
    assert resumed == measure(student)
    assert seen == sorted(seen)
    assert later == sorted(later)
    assert later[-1] == 1.0
    if stop_at > 0.1:
        assert later[0] > seen[0]  # finished stages aren't repeated


def test_the_stages_of_another_run_are_not_used(tmp_path: Path) -> None:
    measure(tiny_model(layers=2, seed=1), checkpoint=tmp_path)
    other = tiny_model(layers=2, seed=2)
    assert measure(other, checkpoint=tmp_path) == measure(other)
    (tmp_path / "stages.json").write_text("{")
    assert measure(other, checkpoint=tmp_path) == measure(other)


def test_no_text_is_both_tuned_on_and_held_out() -> None:
    rows = [*ROWS, *(replace(row, text=row.text.upper() + "  ") for row in ROWS)]
    for seed in range(5):
        task = split_task("public", CLASSIFICATION, rows, REQUEST.model_copy(update={"seed": seed, "test_rows": 7}))
        sides = [{" ".join(row.text.casefold().split()) for row in side} for side in (task.tune, task.test)]
        assert not sides[0] & sides[1]
        assert (len(task.test), len(sides[0]) + len(sides[1])) == (7, len(ROWS))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:5] * 4, "5 different texts"),
        ([Row(row.text) for row in ROWS], "no label"),
        ([Row(row.text, "odd") for row in ROWS], "odd"),
        ([Row(row.text, "positive") for row in ROWS], "two classes"),
    ],
)
def test_unsuitable_rows_are_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(DataInvalid, match=message) as refusal:
        split_task("public", CLASSIFICATION, rows, REQUEST)
    assert "public" in refusal.value.detail


def test_unsuitable_texts_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(DataInvalid, match="1 texts are among both"):
        attacked_texts(model, MEMBERS, [*OTHERS, f"  {MEMBERS[3].upper()}"], REQUEST)
    with pytest.raises(DataInvalid, match="19 different members"):
        attacked_texts(model, [*MEMBERS[:19], *MEMBERS[:19], "nice"], OTHERS, REQUEST)
    few = REQUEST.model_copy(update={"texts": 21})
    seen, unseen = attacked_texts(model, MEMBERS * 2, OTHERS, few)
    assert (len(set(seen)), len(set(unseen))) == (21, 21)


# --- the job ------------------------------------------------------------------------------------------


@pytest.fixture
def ready(server_harness: ServerHarness) -> ServerHarness:
    add_student(server_harness, server_harness.add_target())
    server_harness.add_rows(rows=[(row.text, str(row.label)) for row in ROWS])
    for name, side in (("seen", MEMBERS), ("unseen", OTHERS)):
        server_harness._add_dataset(name, DatasetKind.CORPUS, "\n".join(side), len(side), None)
    return server_harness


def add_report(server_harness: ServerHarness, **changes: Any) -> str:
    document = ReportCreate.model_validate({**REQUEST.model_dump(mode="json"), **changes})
    return server_harness.add_job(JobKind.REPORT, document.model_dump(mode="json"))


def test_a_report_job_has_the_result_of_trade_off(ready: ServerHarness) -> None:
    _, job = run(ready, add_report(ready))
    assert (job.state, job.error) == (JobState.SUCCEEDED, None)
    report = TradeOffReport.model_validate(job.result)
    expected = measure(tiny_model("llama", layers=2, seed=1), tiny_model("llama", layers=4))
    assert report.tasks == list(expected.tasks)
    assert report.leakage == list(expected.leakage)
    assert report.measured_loss == expected.loss
    assert (report.recorded_loss, report.members, report.non_members) == (None, 24, 24)
    with ready.database.read() as session:
        rows = {row.name: row for row in session.query(ModelRow)}
    target, student = rows["target"], rows["student-1"]
    assert report.parameter_share == student.parameters / target.parameters < 1
    assert report.byte_share == student.size_bytes / target.size_bytes < 1
    assert (report.target.hash, report.student.layers) == (target.hash, 2)


def test_the_report_has_the_losses_of_the_distillation_job(ready: ServerHarness) -> None:
    with ready.database.write() as session:
        student = session.query(ModelRow).filter_by(name="student-1").one()
        job = JobRow(
            kind=JobKind.DISTIL,
            request={"corpus": ["seen"]},
            owner_key_id=ready.provider.id,
            state=JobState.SUCCEEDED,
            metrics={"ce": 1.5, "lm": 3.0, "loss": 13.6, "tokens_per_second": 9.0, "cos": None},
            result={"model_id": student.id},
        )
        session.add(job)
    _, report_job = run(ready, add_report(ready))
    recorded = TradeOffReport.model_validate(report_job.result).recorded_loss
    assert recorded is not None
    assert (recorded.job_id, recorded.corpus) == (job.id, ["seen"])
    assert recorded.losses == {"ce": 1.5, "lm": 3.0, "loss": 13.6}


def test_a_text_on_both_sides_fails_the_job(ready: ServerHarness) -> None:
    ready._add_dataset("mixed", DatasetKind.CORPUS, "\n".join([*OTHERS, MEMBERS[0]]), 25, None)
    _, job = run(ready, add_report(ready, non_members=["mixed"]))
    assert job.error is not None
    assert (job.state, job.error["code"]) == (JobState.FAILED, "data_invalid")


@pytest.mark.slow  # three processes that each load torch; resuming is also tested above
def test_a_killed_report_resumes_and_equals_an_uninterrupted_one(ready: ServerHarness) -> None:
    """The worker and its job's process are killed while the student is tuned."""
    job_id = add_report(ready, tuning=LONG)
    ready.start_redis()
    worker = ready.start_worker()
    ready.reaches(job_id, stage="tuned student on public", seconds=200.0)
    worker.kill()
    ready.start_worker()
    row = ready.ended(job_id, 200.0)
    assert row.state is JobState.SUCCEEDED, (row.error, ready.log())
    assert row.attempt == 2
    events = [event.data for event in ready.events(job_id)]
    second_attempt = events[[event.get("attempt") for event in events].index(2) :]
    assert "target on public" not in {event.get("stage") for event in second_attempt}  # done by the first attempt
    whole = TradeOffReport.model_validate(ready.ended(add_report(ready, tuning=LONG), 200.0).result)
    resumed = TradeOffReport.model_validate(row.result)
    assert resumed == whole.model_copy(update={"job_id": resumed.job_id, "made_at": resumed.made_at})
