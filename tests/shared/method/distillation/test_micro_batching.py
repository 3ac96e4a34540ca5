"""The memory plan of a distillation: what a step takes, micro-batches that fit, and refusals with numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from post_shared.engine.memory_profiler import peak_bytes
from post_shared.errors import OutOfMemory
from post_shared.method.distillation import micro_batching
from post_shared.method.distillation.corpus import prepare_corpus
from post_shared.method.distillation.distil import distil
from post_shared.method.distillation.micro_batching import (
    FLOAT_BYTES,
    TRAINING_STATES,
    activation_bytes,
    check_student_fits,
    plan_micro_batches,
)
from post_shared.method.distillation.objective import Objective
from post_shared.method.distillation.trainer import DistillationStep, Student
from post_shared.model.layers import copy_student
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.distributed import ALONE
from post_shared.training.progress import Progress
from tests.models import TEXTS, tiny_model

PARAGRAPHS = [" ".join(TEXTS)] * 80


def distillation_step(rows: int = 16, length: int = 64, **more: int) -> DistillationStep:
    target = tiny_model()
    model = copy_student(target, [0, 1, 3])
    student = Student(model, learning_rate=1e-3, freeze_head=True, freeze_embeddings=True)
    corpus = prepare_corpus(target, PARAGRAPHS, length, None)
    return DistillationStep(
        student, Objective(target, model, 2.0), corpus, ALONE, rows, more.get("gradient_accumulation_steps", 1), 0
    )


def trained_bytes(step: DistillationStep) -> int:
    return sum(weight.nbytes for weight in step.student.weights.values())


@pytest.mark.parametrize("micro_batches", [1, 4, 16])
def test_the_plan_is_near_what_a_step_takes(micro_batches: int) -> None:
    step = distillation_step(gradient_accumulation_steps=micro_batches)
    planned = TRAINING_STATES * trained_bytes(step) + activation_bytes(step) * 16 // micro_batches

    def run() -> None:
        step.gradients(0)
        step.student.step(1e-3)

    measured = peak_bytes(run)
    assert 0.6 * measured < planned < 1.5 * measured


def test_a_batch_is_split_into_the_fewest_micro_batches_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    step = distillation_step()
    per_sequence, fixed = activation_bytes(step), TRAINING_STATES * trained_bytes(step)

    def free(size: float) -> None:
        monkeypatch.setattr(micro_batching, "free_bytes", lambda _: int(size))

    for sequences, micro_batches in ((16, 1), (15, 2), (8, 2), (5, 4), (1, 16)):
        free((fixed + per_sequence * (sequences + 0.5)) / micro_batching.SHARE)
        assert plan_micro_batches(step, None) == micro_batches
    for size in (2, 3):  # processes share the rows, and on a CPU the memory
        free(size * (fixed + per_sequence * 2.5) / micro_batching.SHARE)
        micro_batches = plan_micro_batches(replace(step, group=replace(ALONE, size=size)), None)
        assert -(-16 // (size * micro_batches)) <= 2
    free((fixed + 0.5 * per_sequence) / micro_batching.SHARE)
    message = r"\d+ MB for the gradients .* micro-batch of 1 sequences; \d+ MB are free on cpu"
    with pytest.raises(OutOfMemory, match=message):
        plan_micro_batches(step, None)
    free(fixed + 4.5 * per_sequence)  # an explicit number may use all that is free
    assert plan_micro_batches(step, 4) == 4
    with pytest.raises(OutOfMemory, match="gradient_accumulation_steps"):
        plan_micro_batches(step, 2)


def test_a_student_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model()
    size = FLOAT_BYTES * copy_student(target, [0, 3]).parameters
    monkeypatch.setattr(micro_batching, "free_bytes", lambda _: size)
    check_student_fits(target, [0, 3])
    with pytest.raises(OutOfMemory, match="keep fewer layers"):
        check_student_fits(target, [0, 1, 3])


def test_a_distillation_in_little_memory_has_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    step, target = distillation_step(rows=8, length=32), tiny_model()
    config = DistilOptions(keep_layers=(0, 1, 3), student_init="copy", steps=3, batch_tokens=256, sequence_length=32)
    losses: list[list[float]] = []
    little = int((TRAINING_STATES * trained_bytes(step) + 2.5 * activation_bytes(step)) / micro_batching.SHARE)
    for size in (10**12, little):
        monkeypatch.setattr(micro_batching, "free_bytes", lambda _, size=size: size)
        seen: list[Progress] = []
        distil(target, PARAGRAPHS, config, on_progress=seen.append)
        losses.append([progress.metrics["loss"] for progress in seen if progress.stage == "distil"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
