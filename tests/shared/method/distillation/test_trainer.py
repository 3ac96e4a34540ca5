"""Laws of a step: parts of a batch, and several processes, add up to the batch; alignment acts inside the models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState

from post_server.distillations.follower import write_order
from post_server.distillations.launcher import followers
from post_shared.errors import Cancelled, InvalidInput, JobKilled
from post_shared.method.distillation.corpus import next_token, prepare_corpus
from post_shared.method.distillation.distil import distil
from post_shared.method.distillation.objective import Objective, alignment_loss, parts_of
from post_shared.method.losses import softened_cross_entropy
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.distributed import ALONE, Group
from post_shared.training.progress import Progress
from tests.models import TEXTS, tiny_model

PARAGRAPHS = [" ".join(TEXTS)] * 40
CONFIG = DistilOptions(keep_layers=2, steps=4, batch_tokens=160, sequence_length=32)


def alike(one: LanguageModel, other: LanguageModel) -> None:
    """By what they compute: a key's bias changes nothing, so AdamW moves it by the sign of a rounding."""
    block = prepare_corpus(one, PARAGRAPHS, 32, None).batch(0, 4, 0)
    torch.testing.assert_close(one.hidden(block), other.hidden(block), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize("accumulate", [2, 5])
def test_a_batch_in_parts_is_the_batch(family: str, accumulate: int) -> None:
    """5 rows in 2 parts too: the parts differ in rows and in predicted positions."""
    target, losses = tiny_model(family), dict[int, list[float]]()
    start = "least_squares" if family == "llama" else "copy"
    students = []
    for parts in (1, accumulate):
        seen = losses.setdefault(parts, [])
        report = lambda p, seen=seen: seen.append(p.metrics["loss"]) if p.stage == "distil" else None  # noqa: E731
        students.append(
            distil(
                target,
                PARAGRAPHS,
                CONFIG.replace(student_init=start, gradient_accumulation_steps=parts),
                on_progress=report,
            )
        )
    assert losses[accumulate] == pytest.approx(losses[1], rel=1e-4)
    alike(*students)


def test_parts_hold_every_row_and_position_once() -> None:
    block = prepare_corpus(tiny_model(), PARAGRAPHS, 32, None).batch(0, 7, 0)
    whole = next_token(block, 0.3, torch.Generator().manual_seed(0))
    parts = parts_of(whole, range(10, 17), 3)
    assert torch.equal(torch.cat([part.prediction.inputs for part in parts]), block)
    assert [at for part in parts for at in part.blocks] == list(range(10, 17))
    read = [part.prediction.inputs[part.prediction.rows, part.prediction.positions] for part in parts]
    assert torch.equal(torch.cat(read), block[whole.rows, whole.positions])
    assert torch.equal(torch.cat([part.prediction.tokens for part in parts]), whole.tokens)
    assert {(part.positions, part.tokens) for part in parts} == {(len(whole.rows), block.numel())}


def test_more_parts_than_rows_are_refused() -> None:
    with pytest.raises(InvalidInput, match="gradient_accumulation_steps"):
        CONFIG.replace(gradient_accumulation_steps=6)
    with pytest.raises(InvalidInput, match="can't be split"):
        distil(tiny_model(), PARAGRAPHS, CONFIG, group=replace(ALONE, size=6))


def aligned(target: LanguageModel, student: LanguageModel, kept: Sequence[int]) -> float:
    """The alignment loss on one batch."""
    block = prepare_corpus(target, PARAGRAPHS, 32, None).batch(0, 8, 0)
    part = parts_of(next_token(block, 0.5, torch.Generator().manual_seed(0)), range(8), 1)[0]
    objective = Objective(target, student, 2.0, kept=kept, alignment=2.0)
    losses = objective.losses(part)
    without = objective.total({name: loss for name, loss in losses.items() if name != "align"})
    torch.testing.assert_close(objective.total(losses), without + 2.0 * losses["align"])
    return float(losses["align"])


def test_alignment_is_zero_for_equal_states_and_compares_what_enters_the_same_layer() -> None:
    states = torch.randn(2, 3, 8)
    assert float(alignment_loss(states, states).abs().max()) == 0
    torch.testing.assert_close(alignment_loss(states, torch.zeros_like(states)), torch.ones(2, 3))
    target = tiny_model("llama")
    assert aligned(target, target, range(4)) == 0
    assert aligned(target, copy_student(target, [0, 1, 2]), [0, 1, 2]) == 0  # nothing is left out before layer 2
    assert aligned(target, copy_student(target, [0, 1, 3]), [0, 1, 3]) > 1e-3  # layer 3 is entered without layer 2


def test_alignment_falls_by_its_weight() -> None:
    target, kept = tiny_model("llama"), (0, 3)
    config = CONFIG.replace(student_init="copy", keep_layers=kept, steps=30, learning_rate=3e-3)
    without, with_it = (distil(target, PARAGRAPHS, config.replace(alignment=weight)) for weight in (0.0, 50.0))
    assert aligned(target, with_it, kept) < 0.9 * aligned(target, without, kept)
    assert aligned(target, with_it, kept) < 0.9 * aligned(target, copy_student(target, kept), kept)
    with pytest.raises(InvalidInput, match="alignment"):
        config.replace(alignment=-1.0)


# --- several processes --------------------------------------------------------------------------------


@pytest.fixture
def led(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the target; afterwards this process belongs to no group."""
    before = dict(os.environ)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_model("llama").save(tmp_path / "target")
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    PartialState._reset_state()
    os.environ.clear()
    os.environ.update(before)


def order(folder: Path, config: DistilOptions) -> Path:
    path = folder / "order.json"
    write_order(path, folder / "target", config, dtype=torch.float32, checkpoint=None, cache_bytes=0, cpu=True)
    return path


def test_two_processes_are_one_with_both_shares_and_resume_as_one(led: Path) -> None:
    config = CONFIG.replace(templates=("{text} It was",))
    target = LanguageModel.load(led / "target", device="cpu")
    steps: list[Progress] = []
    alone = distil(target, PARAGRAPHS, config, on_progress=steps.append)
    expected = [p.metrics["loss"] for p in steps if p.stage == "distil"]

    def stop(progress: Progress) -> None:
        if progress.stage == "distil" and progress.step == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):  # one process begins, two go on
        distil(target, PARAGRAPHS, config, on_progress=stop, checkpoint=led / "checkpoint")
    steps.clear()
    with followers(order(led, config), 2, cpu=True) as group:
        assert (group.rank, group.size, group.leads) == (0, 2, True)
        together = distil(
            target, PARAGRAPHS, config, group=group, on_progress=steps.append, checkpoint=led / "checkpoint"
        )
    losses = [p.metrics["loss"] for p in steps if p.stage == "distil"]
    assert losses == pytest.approx(expected[2:], rel=1e-4)
    alike(together, alone)


def test_a_follower_that_is_gone_ends_the_work(led: Path) -> None:
    """It can't load its model, so it never comes; or it falls away later."""
    target = LanguageModel.load(led / "target", device="cpu")
    path = order(led, CONFIG)
    config = (led / "target" / "config.json").read_text()
    (led / "target" / "config.json").write_text("{}")
    with pytest.raises(JobKilled, match="another GPU ended"), followers(path, 2, cpu=True) as group:
        raise AssertionError(group)
    (led / "target" / "config.json").write_text(config)

    def kill(progress: Progress) -> None:
        if progress.stage == "distil":
            psutil.Process().children()[-1].kill()

    with pytest.raises(JobKilled, match="ended with -9"), followers(path, 2, cpu=True) as group:
        distil(target, PARAGRAPHS, CONFIG.replace(steps=1000), group=group, on_progress=kill)


def test_a_process_alone_needs_nobody() -> None:
    ALONE.call(0)
    ALONE.end()
    assert ALONE.leads
    tensor = torch.ones(2)
    ALONE.add([tensor])
    ALONE.share([tensor])
    assert tensor.tolist() == [1, 1]
    assert isinstance(ALONE, Group)
    with pytest.raises(InvalidInput), followers(Path("order.json"), 1):
        pass


def test_answer_positions_are_also_a_mean_of_their_own() -> None:
    target = tiny_model("llama")
    student = copy_student(target, [0, 3])
    corpus = prepare_corpus(target, PARAGRAPHS, 32, None, templates=["{text} It was"])
    block = corpus.batch(0, 8, 0)

    def losses(end: int | None) -> dict[str, torch.Tensor]:
        asked = next_token(block, 0.5, torch.Generator().manual_seed(0), answer_end=end)
        return Objective(target, student, 2.0).losses(parts_of(asked, range(8), 1)[0])

    found, objective = losses(corpus.end), Objective(target, student, 2.0)
    row, place = (block[:, 1:] == corpus.end).nonzero(as_tuple=True)
    with torch.no_grad():
        right, ours = target.head(target.hidden(block)[row, place]), student.head(student.hidden(block)[row, place])
    torch.testing.assert_close(found["answers"], softened_cross_entropy(right, ours).mean())
    without = objective.total({name: loss for name, loss in found.items() if name != "answers"})
    torch.testing.assert_close(objective.total(found), without + 5.0 * found["answers"])
    assert "answers" not in losses(None)
