"""Laws of the transfer: the cached loop equals the paper's, labels don't matter, what doesn't fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from post_shared.data.batches import ShuffledBatches
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import Cancelled, DataInvalid, InvalidInput, PromptMismatch
from post_shared.inference.evaluation import evaluate
from post_shared.method import losses
from post_shared.method.transfer import prompt_ensemble
from post_shared.method.transfer.ensemble import balanced, believed_shares, ensemble, standard
from post_shared.method.transfer.prompt_ensemble import ensemble_scores, instructions, target_scores
from post_shared.method.transfer.teacher_outputs import model_outputs, teacher_outputs
from post_shared.method.transfer.transfer import choose_alpha, ensemble_objective, paper_objective, some_of, transfer
from post_shared.method.transfer.validation import BestStep, hold_out
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import label_words
from post_shared.schemas.transfers import TransferOptions
from post_shared.training.optimizer import PromptAdam
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, per_row, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})
ROWS = [Row(text, label) for text, label in zip(TEXTS, LABELS, strict=True)]


@pytest.fixture(params=["llama", "gpt2", "roberta"])
def pair(request: pytest.FixtureRequest) -> tuple[LanguageModel, LanguageModel]:
    target = tiny_model(request.param)
    return target, copy_student(target, [0, 3])


def published_loop(
    target: LanguageModel, student: LanguageModel, prompt: Tensor, trained: Tensor, alpha: float
) -> Tensor:
    """The slow path, from Eq. 3-5: four forward passes of the plain models, one row at a time, all positions."""
    total = torch.zeros(())
    for row in encode_rows(target, TASK, TEXTS).rows:

        def logits(model: LanguageModel, before: Tensor | None, row: object = row) -> Tensor:
            inputs = model.model.get_input_embeddings()(torch.tensor([row.token_ids]))  # type: ignore[attr-defined]
            if before is not None:
                inputs = torch.cat([before[None], inputs], 1)
            shift = 0 if before is None else before.shape[0]
            return model.model(inputs_embeds=inputs).logits[0, row.positions[0] + shift]  # type: ignore[attr-defined,no-any-return]

        with torch.no_grad():
            right, right_plain, plain = logits(student, prompt), logits(student, None), logits(target, None)
        ours = logits(target, trained)

        def divergence(true: Tensor, guess: Tensor) -> Tensor:
            p, q = (true / 2).softmax(-1), (guess / 2).softmax(-1)
            return (p * (p.log() - q.log())).sum()

        total = total + (1 - alpha) * divergence(right, ours) + alpha * divergence(right - right_plain, ours - plain)
    return total


@pytest.mark.parametrize("method", ["ensemble", "paper"])
def test_a_target_in_bfloat16_gets_nearly_the_same_prompt(
    pair: tuple[LanguageModel, LanguageModel], method: Literal["ensemble", "paper"]
) -> None:
    target, student = pair
    prompt, config = SoftPrompt.random(target, 4, seed=1), TransferOptions(method=method, steps=5, batch_size=4)
    exact = transfer(target, student, TASK, prompt, TEXTS, config)
    target.model.to(torch.bfloat16)
    rounded = transfer(target, student, TASK, prompt, TEXTS, config)
    assert rounded.prompt.embeddings.dtype == torch.float32
    assert rounded.first_loss != exact.first_loss  # or nothing was computed in bfloat16
    assert rounded.first_loss == pytest.approx(exact.first_loss, rel=0.05, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_cached_constants_give_loss_and_gradients_of_the_uncached_loop(
    pair: tuple[LanguageModel, LanguageModel], alpha: float
) -> None:
    target, student = pair
    prompt = SoftPrompt.random(target, 4, seed=1)
    encoded = encode_rows(target, TASK, TEXTS)
    loss = paper_objective(target, teacher_outputs(target, student, prompt, encoded), alpha, 2.0)
    ours, theirs = (SoftPrompt.random(target, 4, seed=9).embeddings.clone().requires_grad_() for _ in range(2))
    total = loss(ours, encoded.batch([3, 1, 2, 0, 7, 6, 5, 4])).sum()
    slow = published_loop(target, student, prompt.embeddings, theirs, alpha)
    torch.testing.assert_close(total, slow, rtol=1e-3, atol=1e-4)
    total.backward()
    slow.backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-3 * float(ours.grad.abs().max()))


def test_alpha_zero_and_one_are_l1_and_l2(pair: tuple[LanguageModel, LanguageModel]) -> None:
    target, student = pair
    prompt = SoftPrompt.random(target, 4, seed=1)
    batch = encode_rows(target, TASK, TEXTS).batch(range(8))
    known = teacher_outputs(target, student, prompt, batch.encoded)
    trained = SoftPrompt.random(target, 4, seed=9).embeddings
    with torch.no_grad():
        ours, right = (
            target.answer_logits(batch, per_row(trained, batch)),
            student.answer_logits(batch, per_row(prompt.embeddings, batch)),
        )
        change = losses.soften(right - student.answer_logits(batch), 2.0)
        first = losses.imitation_loss(ours, losses.soften(right, 2.0))
        second = losses.shift_loss(ours, target.answer_logits(batch), change)
        for alpha, wanted in [(0.0, first), (1.0, second)]:
            got = paper_objective(target, known, alpha, 2.0)(trained, batch)
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_the_ensemble_is_imitated_over_class_scores(pair: tuple[LanguageModel, LanguageModel]) -> None:
    target, student = pair
    prompt = SoftPrompt.random(target, 4, seed=1)
    batch, words = encode_rows(target, TASK, TEXTS).batch(range(8)), label_words(target, TASK)
    known = teacher_outputs(target, student, prompt, batch.encoded, words)
    assert known.student.shape == (8, 2), "no logits over the vocabulary are kept"
    trained = SoftPrompt.random(target, 4, seed=9).embeddings
    with torch.no_grad():
        got = ensemble_objective(target, known, 0.3, words)(trained, batch)
        goal = ensemble(
            words.of(student.answer_logits(batch, per_row(prompt.embeddings, batch))),
            words.of(target.answer_logits(batch)),
            0.3,
        )
        wanted = losses.divergence(goal, words.of(target.answer_logits(batch, per_row(trained, batch))).log_softmax(-1))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_the_target_is_asked_as_it_is_and_in_every_wording(pair: tuple[LanguageModel, LanguageModel]) -> None:
    target, _ = pair
    encoded, words = encode_rows(target, TASK, TEXTS), label_words(target, TASK)
    batch = encoded.batch(range(8))
    assert [text.replace("\n", " ").strip() for text in instructions(TASK)] == [
        "Say whether each text is negative or positive.  Text:",
        "negative or positive? , it was",
        "Labels: negative, positive.",
    ]
    ids = [target.tokenizer(text, add_special_tokens=False).input_ids for text in instructions(TASK)]
    prompts = [target.embed(torch.tensor(each)) for each in ids]
    with torch.no_grad():
        said = [words.of(target.answer_logits(batch, per_row(prompt, batch))) for prompt in (None, *prompts)]
    seen: list[Progress] = []
    found = target_scores(target, encoded, words, TASK, on_progress=seen.append)
    assert [each.step for each in seen] == list(range(1, len(seen) + 1)), "one bar for all"
    assert {each.steps for each in seen} == {len(seen)}
    torch.testing.assert_close(found, ensemble_scores(said), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(standard(found), standard(said[0]), atol=0.05)


def test_a_wording_that_lists_too_many_labels_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model()
    encoded, words = encode_rows(target, TASK, TEXTS), label_words(target, TASK)
    monkeypatch.setattr(prompt_ensemble, "MAX_INSTRUCTION_TOKENS", 1)
    found = target_scores(target, encoded, words, TASK)
    torch.testing.assert_close(found, standard(model_outputs(target, encoded, words)))


def test_several_wordings_rank_better_than_one() -> None:
    """Each has a lean and a spread of its own, which count for nothing."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(2, (2000,), generator=generator)
    signal = torch.nn.functional.one_hot(truth, 2).float()
    said = [
        spread * (signal + torch.randn(2000, 2, generator=generator)) + torch.tensor([calibrated, 0.0])
        for spread, calibrated in ((1.0, 3.0), (0.1, -1.0), (5.0, 2.0))
    ]
    right = [float((balanced(scores).argmax(1) == truth).float().mean()) for scores in (*said, ensemble_scores(said))]
    assert right[-1] > max(right[:-1]) + 0.04


def test_transfer_to_the_student_itself_has_nothing_to_do() -> None:
    model = tiny_model()
    prompt = SoftPrompt.random(model, 4, seed=1)
    result = transfer(model, model, TASK, prompt, TEXTS, TransferOptions(method="paper", steps=3, batch_size=4))
    assert result.first_loss == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("method", ["paper", "ensemble"])
def test_transfer_lowers_its_loss(pair: tuple[LanguageModel, LanguageModel], method: str) -> None:
    target, student = pair
    prompt = SoftPrompt.random(target, 4, seed=1)
    config = TransferOptions(method=method, steps=60, batch_size=8, learning_rate=0.1, alpha=0.5)  # type: ignore[arg-type]
    result = transfer(target, student, TASK, prompt, TEXTS, config)
    assert result.last_loss < 0.9 * result.first_loss
    assert result.prompt.embeddings.shape == prompt.embeddings.shape


@pytest.mark.parametrize("count", [8, 70])
def test_cancelled_and_resumed_equals_undisturbed(tmp_path: Path, count: int) -> None:
    target, texts = tiny_model(), many_texts(count)
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4, seed=1)
    config = TransferOptions(steps=8, batch_size=4)

    def stop(progress: Progress) -> None:
        if progress.stage == "transfer" and progress.step == 5:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        transfer(target, student, TASK, prompt, texts, config, on_progress=stop, checkpoint=tmp_path)
    resumed = transfer(target, student, TASK, prompt, texts, config, checkpoint=tmp_path)
    undisturbed = transfer(target, student, TASK, prompt, texts, config)
    assert resumed.first_loss == undisturbed.first_loss
    assert (resumed.chosen_step, resumed.held_out_loss) == (undisturbed.chosen_step, undisturbed.held_out_loss)
    assert torch.equal(resumed.prompt.embeddings, undisturbed.prompt.embeddings)


def test_a_checkpoint_of_another_model_or_task_is_not_gone_on_from(tmp_path: Path) -> None:
    first, other = tiny_model(seed=1), tiny_model(seed=2)
    student, prompt = copy_student(first, [0, 3]), SoftPrompt.random(first, 4, seed=1)
    config = TransferOptions(steps=4, batch_size=4)

    def stop(progress: Progress) -> None:
        if progress.stage == "transfer" and progress.step == 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        transfer(first, student, TASK, prompt, TEXTS, config, on_progress=stop, checkpoint=tmp_path)
    for target, task in ((other, TASK), (first, Task("{text} It is", TASK.label_words))):
        found = transfer(target, student, task, prompt, TEXTS, config, checkpoint=tmp_path)
        undisturbed = transfer(target, student, task, prompt, TEXTS, config)
        assert torch.equal(found.prompt.embeddings, undisturbed.prompt.embeddings)


@pytest.mark.parametrize(
    ("method", "start", "begins"),
    [
        ("ensemble", None, "instruction"),
        ("ensemble", "source", "source"),
        ("paper", None, "source"),
        ("paper", "instruction", "instruction"),
    ],
)
def test_where_the_prompt_starts(
    pair: tuple[LanguageModel, LanguageModel], method: str, start: str | None, begins: str
) -> None:
    """A step of almost no length ends where it began."""
    target, student = pair
    prompt = SoftPrompt.random(student, 6, seed=1)
    config = TransferOptions(steps=1, learning_rate=1e-9, method=method, prompt_init=start)  # type: ignore[arg-type]
    found = transfer(target, student, TASK, prompt, TEXTS, config).prompt.embeddings
    words = SoftPrompt.from_text(target, "Say whether each text is negative or positive.\n\nText: ", 6)
    torch.testing.assert_close(found, (words if begins == "instruction" else prompt).embeddings)


def test_words_are_cut_or_repeated_so_that_they_end_whole() -> None:
    target = tiny_model()
    whole = target.embed(torch.tensor(target.tokenizer("it was good", add_special_tokens=False).input_ids))
    count = len(whole)
    longer = SoftPrompt.from_text(target, "it was good", 2 * count - 1).embeddings
    assert torch.equal(longer, torch.cat([whole[1:], whole]))
    assert torch.equal(SoftPrompt.from_text(target, "it was good", count - 1).embeddings, whole[:-1])


def test_steps_from_words_are_small(pair: tuple[LanguageModel, LanguageModel]) -> None:
    """The first step of Adam moves every number by the learning rate."""
    target, student = pair
    prompt = SoftPrompt.random(student, 6, seed=1)
    for start, rate in (("instruction", 0.003), ("source", 0.03)):
        still, moved = (
            transfer(
                target, student, TASK, prompt, TEXTS, TransferOptions(steps=1, prompt_init=start, learning_rate=each)
            )  # type: ignore[arg-type]
            for each in (1e-12, None)
        )
        way = (moved.prompt.embeddings - still.prompt.embeddings).abs().median()
        assert float(way) == pytest.approx(rate, rel=0.05)


def test_a_generation_task_is_transferred_too() -> None:
    target = tiny_model()
    prompt = SoftPrompt.random(target, 4, seed=1)
    task = Task("{text} The film is")
    result = transfer(target, copy_student(target, [0, 3]), task, prompt, TEXTS, TransferOptions(steps=3, batch_size=4))
    assert result.prompt.length == 4


def test_alpha_is_chosen_from_public_labels_by_eq_6_or_refused() -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4)
    assert 0.0 <= choose_alpha(target, student, TASK, prompt, ROWS) <= 1.0
    with pytest.raises(InvalidInput, match="give a number"):
        choose_alpha(target, student, TASK, prompt, [Row("x", "sports")])
    with pytest.raises(InvalidInput, match="give a number"):
        choose_alpha(target, student, Task("{text} Answer:"), prompt, ROWS)


def test_public_rows_are_drawn_not_taken_from_the_top() -> None:
    """A file that is sorted by its labels would otherwise show one class alone."""
    every = list(range(1000))
    some = some_of(every, 100, seed=1)
    assert some == sorted(set(some))
    assert len(some) == 100
    assert 30 < sum(at < 500 for at in some) < 70
    assert some == some_of(every, 100, seed=1)
    assert some != some_of(every, 100, seed=2)
    assert some_of(every, 1000) == some_of(every, 5000) == every


def test_alpha_does_not_depend_on_how_a_file_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4)
    seen: list[set[str]] = []
    noted = lambda model, task, rows, *more, **options: (  # noqa: E731
        seen.append({str(row.label) for row in rows}) or evaluate(model, task, rows, *more, **options)
    )
    monkeypatch.setattr("post_shared.method.transfer.transfer.evaluate", noted)
    many = [Row(f"{row.text} {at}", row.label) for at, row in enumerate(ROWS * 5)]
    rows = sorted(many, key=lambda row: str(row.label))
    choose_alpha(target, student, TASK, prompt, rows, max_rows=len(rows) // 3, max_length=32)
    assert seen == [set(TASK.labels)] * 2


def test_what_does_not_belong_together_is_refused() -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4)
    with pytest.raises(PromptMismatch, match="width 16"):
        transfer(target, student, TASK, SoftPrompt(torch.zeros(4, 16)), TEXTS, TransferOptions())
    other = tiny_model("roberta")
    other.model.resize_token_embeddings(50)
    smaller = LanguageModel(other.model, other.tokenizer)
    with pytest.raises(PromptMismatch, match="isn't one of the target"):
        transfer(smaller, student, TASK, prompt, TEXTS, TransferOptions())
    with pytest.raises(DataInvalid, match="no texts"):
        transfer(target, student, TASK, prompt, [], TransferOptions())
    for change in ({"alpha": 1.5}, {"steps": 0}, {"temperature": 0.0}, {"learning_rate": -1.0}):
        with pytest.raises(InvalidInput):
            TransferOptions(**change)  # type: ignore[arg-type]


# --- the ensemble -------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
def test_balanced_classes_are_equally_likely_and_ranked_as_before(classes: int) -> None:
    scores = torch.randn(300, classes, generator=torch.Generator().manual_seed(0)) * 2 + torch.arange(classes) * 1.5
    found = balanced(scores)
    torch.testing.assert_close(found.exp().mean(0), torch.full((classes,), 1 / classes), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(300))
    moved = found - scores
    shift = moved - moved[:, :1]
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-4)  # one constant per class


def test_two_weak_views_together_are_better_than_each() -> None:
    """What the method rests on: independent errors cancel, and the target's lean doesn't matter."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(2, (2000,), generator=generator)
    signal = torch.nn.functional.one_hot(truth, 2).float()

    def right(scores: Tensor) -> float:
        return float((scores.argmax(1) == truth).float().mean())

    student = signal + torch.randn(2000, 2, generator=generator)
    target = 0.1 * signal + 0.1 * torch.randn(2000, 2, generator=generator) - torch.tensor([1.0, 0.0])
    together = ensemble(student, target, 1.0)
    assert right(target) < 0.6
    assert right(together) > max(right(balanced(student)), right(balanced(target))) + 0.04
    alone = balanced(student, believed_shares(student))
    torch.testing.assert_close(ensemble(student, target, 0.0).argmax(1), alone.argmax(1))


def test_what_the_student_says_about_the_texts_as_a_whole_counts_half() -> None:
    """2/3 and 1/3 lie halfway from even to 0.8 and 0.2, as a geometric mean."""
    student = torch.tensor([0.8, 0.2]).log() + torch.zeros(50, 1)
    torch.testing.assert_close(believed_shares(student), torch.tensor([2 / 3, 1 / 3]))
    generator = torch.Generator().manual_seed(0)
    unsure = student + torch.randn(50, 2, generator=generator)
    found = ensemble(unsure, torch.randn(50, 2, generator=generator), 0.7)
    torch.testing.assert_close(found.exp().mean(0), believed_shares(unsure), rtol=0, atol=1e-3)


def test_a_student_that_tells_no_texts_apart_leaves_the_classes_open() -> None:
    same = torch.zeros(10, 2) + torch.tensor([1.0, -1.0])
    found = ensemble(same, torch.randn(10, 2, generator=torch.Generator().manual_seed(0)), 0.5)
    torch.testing.assert_close(found.exp(), believed_shares(same).expand(10, 2), rtol=0, atol=1e-3)


def test_scores_that_are_no_numbers_are_refused() -> None:
    broken = torch.zeros(4, 2)
    broken[1, 0] = torch.nan
    for student, target in ((broken, torch.ones(4, 2)), (torch.ones(4, 2), broken)):
        with pytest.raises(InvalidInput, match="no numbers"):
            ensemble(student, target, 1.0)


def test_a_student_with_another_tokenizer_is_refused() -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4)
    swapped = {" good": " awful"}

    class Other:
        def __getattr__(self, name: str) -> object:
            return getattr(target.tokenizer, name)

        def __call__(self, text: object, **options: object) -> object:
            return target.tokenizer(swapped.get(text, text) if isinstance(text, str) else text, **options)

    with pytest.raises(PromptMismatch, match="different tokens"):
        transfer(target, LanguageModel(student.model, Other()), TASK, prompt, TEXTS, TransferOptions(steps=1))


# --- the chosen step ----------------------------------------------------------------------------------


def many_texts(count: int) -> list[str]:
    return [f"{text} {number}" for number in range(-(-count // len(TEXTS))) for text in TEXTS][:count]


def test_rows_are_left_out_of_many_only_and_never_trained_on() -> None:
    assert hold_out(63, seed=0) == (list(range(63)), [])
    trained, left_out = hold_out(1000, seed=0)
    assert len(left_out) == 64
    assert sorted(trained + left_out) == list(range(1000))
    assert hold_out(1000, seed=1)[1] != left_out
    encoded = encode_rows(tiny_model(), TASK, many_texts(80))
    batches = ShuffledBatches(encoded, 8, 0, rows=range(0, 80, 2))
    assert {row for step in range(20) for row in batches(step).index} == set(range(0, 80, 2))


def test_the_step_that_does_best_on_held_out_rows_is_chosen() -> None:
    batch = encode_rows(tiny_model(), TASK, TEXTS).batch(range(4))
    adam = PromptAdam(torch.nn.Parameter(torch.zeros(1, 1)), 0.1)
    best = BestStep(
        adam, lambda prompt, rows: (prompt - 0.52).square().expand(4, 1)[:, 0], batch, batch_size=2, steps=10
    )
    for _ in range(10):
        best.update(lambda prompt, rows: -prompt.expand(4, 1)[:, 0], batch)  # training runs on past the best place
    prompt, step, loss = best.chosen
    assert step == 5
    assert prompt.item() == pytest.approx(0.5, abs=1e-3)
    assert loss == pytest.approx(0.0004, abs=1e-4)


def test_a_transfer_reports_the_held_out_loss_of_the_prompt_that_it_returns() -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4, seed=1)
    seen: dict[int, float] = {}

    def watch(progress: Progress) -> None:
        if progress.stage == "transfer" and "held_out_loss" in progress.metrics:
            seen[progress.step] = progress.metrics["held_out_loss"]

    config = TransferOptions(steps=20, batch_size=8)
    result = transfer(target, student, TASK, prompt, many_texts(80), config, on_progress=watch)
    assert result.held_out_loss == min(seen.values())
    assert seen[result.chosen_step] == result.held_out_loss
    fewer = transfer(target, student, TASK, prompt, many_texts(40), config)
    assert (fewer.chosen_step, fewer.held_out_loss) == (20, None)


@pytest.mark.parametrize("method", ["ensemble", "paper"])
def test_a_target_that_lies_on_the_disk_is_transferred_to_as_one_in_memory(method: str, tmp_path: Path) -> None:
    tiny_model().save(tmp_path)
    plain = LanguageModel.load(tmp_path, device="cpu")
    spread = LanguageModel.load(tmp_path, device="spread", memory={"cpu": 0})
    prompt, config = SoftPrompt.random(plain, 4), TransferOptions(steps=4, batch_size=4, method=method)
    found = []
    for target in (plain, spread):
        student = copy_student(target, [0, 3])
        assert not any(weight.is_meta for weight in student.model.parameters())
        assert choose_alpha(target, student, TASK, prompt, ROWS) == choose_alpha(plain, student, TASK, prompt, ROWS)
        found.append(transfer(target, student, TASK, prompt, TEXTS, config))
    torch.testing.assert_close(found[1].prompt.embeddings, found[0].prompt.embeddings, rtol=1e-4, atol=1e-5)
    assert found[1].last_loss == pytest.approx(found[0].last_loss, rel=1e-4)
