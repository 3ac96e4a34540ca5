"""The memory plan of a distillation: what a step takes, a batch cut so that it fits, refusals with figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from post_shared.engine.memory_profiler import peak_bytes
from post_shared.errors import OutOfMemory
from post_shared.method.distillation import micro_batching
from post_shared.method.distillation.corpus import prepare_corpus
from post_shared.method.distillation.distil import distil
from post_shared.method.distillation.micro_batching import FLOAT, STATES, check_student, kept_per_sequence, plan_parts
from post_shared.method.distillation.objective import Objective
from post_shared.method.distillation.trainer import Descent, Student
from post_shared.model.layers import copy_student
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.distributed import ALONE
from post_shared.training.progress import Progress
from tests.models import TEXTS, tiny_model

PARAGRAPHS = [" ".join(TEXTS)] * 80


def descent(rows: int = 16, length: int = 64, **more: int) -> Descent:
    target = tiny_model()
    model = copy_student(target, [0, 1, 3])
    student = Student(model, learning_rate=1e-3, freeze_head=True, freeze_embeddings=True)
    corpus = prepare_corpus(target, PARAGRAPHS, length, None)
    return Descent(
        student, Objective(target, model, 2.0), corpus, ALONE, rows, more.get("gradient_accumulation_steps", 1), 0
    )


def trained_bytes(of: Descent) -> int:
    return sum(weight.nbytes for weight in of.student.weights.values())


@pytest.mark.parametrize("accumulate", [1, 4, 16])
def test_the_plan_is_near_what_a_step_takes(accumulate: int) -> None:
    one = descent(gradient_accumulation_steps=accumulate)
    planned = STATES * trained_bytes(one) + kept_per_sequence(one) * 16 // accumulate

    def step() -> None:
        one.gradients(0)
        one.student.step(1e-3)

    measured = peak_bytes(step)
    assert 0.6 * measured < planned < 1.5 * measured


def test_a_batch_is_cut_into_as_few_parts_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    one = descent()
    each, fixed = kept_per_sequence(one), STATES * trained_bytes(one)

    def free(size: float) -> None:
        monkeypatch.setattr(micro_batching, "free_bytes", lambda _: int(size))

    for sequences, parts in ((16, 1), (15, 2), (8, 2), (5, 4), (1, 16)):
        free((fixed + each * (sequences + 0.5)) / micro_batching.SHARE)
        assert plan_parts(one, None) == parts
    for size in (2, 3):  # processes share the rows, and on a CPU the memory
        free(size * (fixed + each * 2.5) / micro_batching.SHARE)
        parts = plan_parts(replace(one, group=replace(ALONE, size=size)), None)
        assert -(-16 // (size * parts)) <= 2
    free((fixed + 0.5 * each) / micro_batching.SHARE)
    with pytest.raises(OutOfMemory, match=r"\d+ MB for the gradients .* part of 1 sequences; \d+ MB are free on cpu"):
        plan_parts(one, None)
    free(fixed + 4.5 * each)  # what is asked for may take all there is
    assert plan_parts(one, 4) == 4
    with pytest.raises(OutOfMemory, match="gradient_accumulation_steps"):
        plan_parts(one, 2)


def test_a_student_that_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model()
    size = FLOAT * copy_student(target, [0, 3]).parameters
    monkeypatch.setattr(micro_batching, "free_bytes", lambda _: size)
    check_student(target, [0, 3])
    with pytest.raises(OutOfMemory, match="keep fewer layers"):
        check_student(target, [0, 1, 3])


def test_a_distillation_in_little_memory_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, target = descent(rows=8, length=32), tiny_model()
    config = DistilOptions(keep_layers=(0, 1, 3), student_init="copy", steps=3, batch_tokens=256, sequence_length=32)
    losses: list[list[float]] = []
    for size in (10**12, int((STATES * trained_bytes(one) + 2.5 * kept_per_sequence(one)) / micro_batching.SHARE)):
        monkeypatch.setattr(micro_batching, "free_bytes", lambda _, size=size: size)
        seen: list[Progress] = []
        distil(target, PARAGRAPHS, config, on_progress=seen.append)
        losses.append([progress.metrics["loss"] for progress in seen if progress.stage == "distil"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
