"""Laws of a step: micro-batches and processes add up to the batch; alignment compares inner states."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState

from post_server.distillations.follower import write_config
from post_server.distillations.launcher import followers
from post_shared.errors import Cancelled, InvalidInput, JobKilled
from post_shared.method.distillation.corpus import next_token, prepare_corpus
from post_shared.method.distillation.distil import distil
from post_shared.method.distillation.objective import Objective, alignment_loss, split_batch
from post_shared.method.losses import softened_cross_entropy
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.distributed import ALONE, Group
from post_shared.training.progress import Progress
from tests.models import TEXTS, tiny_model

PARAGRAPHS = [" ".join(TEXTS)] * 40
CONFIG = DistilOptions(keep_layers=2, steps=4, batch_tokens=160, sequence_length=32)


def assert_equal_outputs(one: LanguageModel, other: LanguageModel) -> None:
    """Weights may differ: a key's bias has no effect, so AdamW moves it by the sign of a rounding error."""
    block = prepare_corpus(one, PARAGRAPHS, 32, None).batch(0, 4, 0)
    torch.testing.assert_close(one.hidden(block), other.hidden(block), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize("micro_batches", [2, 5])
def test_micro_batches_add_up_to_the_batch(family: str, micro_batches: int) -> None:
    """5 rows in 2 micro-batches too: these differ in rows and in predicted positions."""
    target, losses = tiny_model(family), dict[int, list[float]]()
    student_init = "least_squares" if family == "llama" else "copy"
    students = []
    for count in (1, micro_batches):
        seen = losses.setdefault(count, [])
        record = lambda p, seen=seen: seen.append(p.metrics["loss"]) if p.stage == "distil" else None  # noqa: E731
        students.append(
            distil(
                target,
                PARAGRAPHS,
                CONFIG.replace(student_init=student_init, gradient_accumulation_steps=count),
                on_progress=record,
            )
        )
    assert losses[micro_batches] == pytest.approx(losses[1], rel=1e-4)
    assert_equal_outputs(*students)


def test_micro_batches_hold_every_row_and_position_once() -> None:
    block = prepare_corpus(tiny_model(), PARAGRAPHS, 32, None).batch(0, 7, 0)
    targets = next_token(block, 0.3, torch.Generator().manual_seed(0))
    parts = split_batch(targets, range(10, 17), 3)
    assert torch.equal(torch.cat([part.targets.inputs for part in parts]), block)
    assert [index for part in parts for index in part.blocks] == list(range(10, 17))
    read = [part.targets.inputs[part.targets.rows, part.targets.positions] for part in parts]
    assert torch.equal(torch.cat(read), block[targets.rows, targets.positions])
    assert torch.equal(torch.cat([part.targets.tokens for part in parts]), targets.tokens)
    assert {(part.positions, part.tokens) for part in parts} == {(len(targets.rows), block.numel())}


def test_more_micro_batches_than_rows_are_refused() -> None:
    with pytest.raises(InvalidInput, match="gradient_accumulation_steps"):
        CONFIG.replace(gradient_accumulation_steps=6)
    with pytest.raises(InvalidInput, match="can't be split"):
        distil(tiny_model(), PARAGRAPHS, CONFIG, group=replace(ALONE, size=6))


def alignment_of(target: LanguageModel, student: LanguageModel, kept: Sequence[int]) -> float:
    """The alignment loss on one batch."""
    block = prepare_corpus(target, PARAGRAPHS, 32, None).batch(0, 8, 0)
    part = split_batch(next_token(block, 0.5, torch.Generator().manual_seed(0)), range(8), 1)[0]
    objective = Objective(target, student, 2.0, kept=kept, alignment=2.0)
    losses = objective.losses(part)
    without = objective.total({name: loss for name, loss in losses.items() if name != "align"})
    torch.testing.assert_close(objective.total(losses), without + 2.0 * losses["align"])
    return float(losses["align"])


def test_alignment_is_zero_for_equal_states_and_compares_the_inputs_of_a_layer() -> None:
    states = torch.randn(2, 3, 8)
    assert float(alignment_loss(states, states).abs().max()) == 0
    torch.testing.assert_close(alignment_loss(states, torch.zeros_like(states)), torch.ones(2, 3))
    target = tiny_model("llama")
    assert alignment_of(target, target, range(4)) == 0
    assert alignment_of(target, copy_student(target, [0, 1, 2]), [0, 1, 2]) == 0  # no layer is removed before layer 2
    assert alignment_of(target, copy_student(target, [0, 1, 3]), [0, 1, 3]) > 1e-3  # the input of layer 3 lacks layer 2


def test_alignment_falls_with_its_weight() -> None:
    target, kept = tiny_model("llama"), (0, 3)
    config = CONFIG.replace(student_init="copy", keep_layers=kept, steps=30, learning_rate=3e-3)
    without, with_it = (distil(target, PARAGRAPHS, config.replace(alignment=weight)) for weight in (0.0, 50.0))
    assert alignment_of(target, with_it, kept) < 0.9 * alignment_of(target, without, kept)
    assert alignment_of(target, with_it, kept) < 0.9 * alignment_of(target, copy_student(target, kept), kept)
    with pytest.raises(InvalidInput, match="alignment"):
        config.replace(alignment=-1.0)


# --- several processes --------------------------------------------------------------------------------


@pytest.fixture
def group_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the target; afterwards this process has left its group."""
    before = dict(os.environ)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_model("llama").save(tmp_path / "target")
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    PartialState._reset_state()
    os.environ.clear()
    os.environ.update(before)


def follower_config(folder: Path, config: DistilOptions) -> Path:
    path = folder / "order.json"
    write_config(path, folder / "target", config, dtype=torch.float32, checkpoint=None, cache_bytes=0, cpu=True)
    return path


def test_two_processes_compute_and_resume_what_one_does(group_folder: Path) -> None:
    config = CONFIG.replace(templates=("{text} It was",))
    target = LanguageModel.load(group_folder / "target", device="cpu")
    steps: list[Progress] = []
    alone = distil(target, PARAGRAPHS, config, on_progress=steps.append)
    expected = [p.metrics["loss"] for p in steps if p.stage == "distil"]

    def stop(progress: Progress) -> None:
        if progress.stage == "distil" and progress.step == 2:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):  # one process begins, two resume
        distil(target, PARAGRAPHS, config, on_progress=stop, checkpoint=group_folder / "checkpoint")
    steps.clear()
    with followers(follower_config(group_folder, config), 2, cpu=True) as group:
        assert (group.rank, group.size, group.leads) == (0, 2, True)
        together = distil(
            target, PARAGRAPHS, config, group=group, on_progress=steps.append, checkpoint=group_folder / "checkpoint"
        )
    losses = [p.metrics["loss"] for p in steps if p.stage == "distil"]
    assert losses == pytest.approx(expected[2:], rel=1e-4)
    assert_equal_outputs(together, alone)


def test_a_follower_that_ends_fails_the_job(group_folder: Path) -> None:
    """It can't load its model, so it never joins; or it is killed later."""
    target = LanguageModel.load(group_folder / "target", device="cpu")
    path = follower_config(group_folder, CONFIG)
    config = (group_folder / "target" / "config.json").read_text()
    (group_folder / "target" / "config.json").write_text("{}")
    with pytest.raises(JobKilled, match="another GPU ended"), followers(path, 2, cpu=True) as group:
        raise AssertionError(group)
    (group_folder / "target" / "config.json").write_text(config)

    def kill(progress: Progress) -> None:
        if progress.stage == "distil":
            psutil.Process().children()[-1].kill()

    with pytest.raises(JobKilled, match="ended with -9"), followers(path, 2, cpu=True) as group:
        distil(target, PARAGRAPHS, CONFIG.replace(steps=1000), group=group, on_progress=kill)


def test_a_process_alone_needs_no_group() -> None:
    ALONE.announce(0)
    ALONE.end()
    assert ALONE.leads
    tensor = torch.ones(2)
    ALONE.reduce([tensor])
    ALONE.broadcast([tensor])
    assert tensor.tolist() == [1, 1]
    assert isinstance(ALONE, Group)
    with pytest.raises(InvalidInput), followers(Path("order.json"), 1):
        pass


def test_answer_positions_have_a_second_mean() -> None:
    target = tiny_model("llama")
    student = copy_student(target, [0, 3])
    corpus = prepare_corpus(target, PARAGRAPHS, 32, None, templates=["{text} It was"])
    block = corpus.batch(0, 8, 0)

    def losses(end: int | None) -> dict[str, torch.Tensor]:
        targets = next_token(block, 0.5, torch.Generator().manual_seed(0), answer_end=end)
        return Objective(target, student, 2.0).losses(split_batch(targets, range(8), 1)[0])

    terms, objective = losses(corpus.end), Objective(target, student, 2.0)
    rows, positions = (block[:, 1:] == corpus.end).nonzero(as_tuple=True)
    with torch.no_grad():
        teacher, logits = (model.head(model.hidden(block)[rows, positions]) for model in (target, student))
    torch.testing.assert_close(terms["answers"], softened_cross_entropy(teacher, logits).mean())
    without = objective.total({name: loss for name, loss in terms.items() if name != "answers"})
    torch.testing.assert_close(objective.total(terms), without + 5.0 * terms["answers"])
    assert "answers" not in losses(None)
