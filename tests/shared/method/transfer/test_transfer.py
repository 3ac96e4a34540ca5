"""Laws of the transfer: the cached loop equals the paper's, labels don't matter, mismatches are refused."""

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
from post_shared.method.transfer.transfer import (
    choose_alpha,
    ensemble_objective,
    paper_objective,
    sample_rows,
    transfer,
)
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
    """The slow path of Eq. 3-5: four forward passes of the plain models, one row at a time, at all positions."""
    total = torch.zeros(())
    for row in encode_rows(target, TASK, TEXTS).rows:

        def logits(model: LanguageModel, before: Tensor | None, row: object = row) -> Tensor:
            inputs = model.model.get_input_embeddings()(torch.tensor([row.token_ids]))  # type: ignore[attr-defined]
            if before is not None:
                inputs = torch.cat([before[None], inputs], 1)
            shift = 0 if before is None else before.shape[0]
            return model.model(inputs_embeds=inputs).logits[0, row.positions[0] + shift]  # type: ignore[attr-defined,no-any-return]

        with torch.no_grad():
            prompted, plain, target_plain = logits(student, prompt), logits(student, None), logits(target, None)
        logits_t = logits(target, trained)

        def divergence(reference: Tensor, approximation: Tensor) -> Tensor:
            p, q = (reference / 2).softmax(-1), (approximation / 2).softmax(-1)
            return (p * (p.log() - q.log())).sum()

        imitation, shift = divergence(prompted, logits_t), divergence(prompted - plain, logits_t - target_plain)
        total = total + (1 - alpha) * imitation + alpha * shift
    return total


@pytest.mark.parametrize("method", ["ensemble", "paper"])
def test_a_bfloat16_target_gets_nearly_the_same_prompt(
    pair: tuple[LanguageModel, LanguageModel], method: Literal["ensemble", "paper"]
) -> None:
    target, student = pair
    prompt, config = SoftPrompt.random(target, 4, seed=1), TransferOptions(method=method, steps=5, batch_size=4)
    exact = transfer(target, student, TASK, prompt, TEXTS, config)
    target.model.to(torch.bfloat16)
    rounded = transfer(target, student, TASK, prompt, TEXTS, config)
    assert rounded.prompt.embeddings.dtype == torch.float32
    assert rounded.first_loss != exact.first_loss  # otherwise nothing was computed in bfloat16
    assert rounded.first_loss == pytest.approx(exact.first_loss, rel=0.05, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_cached_teacher_outputs_give_the_loss_and_gradients_of_the_published_loop(
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
    outputs = teacher_outputs(target, student, prompt, batch.encoded)
    trained = SoftPrompt.random(target, 4, seed=9).embeddings
    with torch.no_grad():
        logits = target.answer_logits(batch, per_row(trained, batch))
        prompted = student.answer_logits(batch, per_row(prompt.embeddings, batch))
        change = losses.soften(prompted - student.answer_logits(batch), 2.0)
        imitation = losses.imitation_loss(logits, losses.soften(prompted, 2.0))
        shift = losses.shift_loss(logits, target.answer_logits(batch), change)
        for alpha, expected in [(0.0, imitation), (1.0, shift)]:
            loss = paper_objective(target, outputs, alpha, 2.0)(trained, batch)
            torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_the_ensemble_is_imitated_over_class_scores(pair: tuple[LanguageModel, LanguageModel]) -> None:
    target, student = pair
    prompt = SoftPrompt.random(target, 4, seed=1)
    batch, words = encode_rows(target, TASK, TEXTS).batch(range(8)), label_words(target, TASK)
    outputs = teacher_outputs(target, student, prompt, batch.encoded, words)
    assert outputs.student.shape == (8, 2), "no logits over the vocabulary are kept"
    trained = SoftPrompt.random(target, 4, seed=9).embeddings
    with torch.no_grad():
        loss = ensemble_objective(target, outputs, 0.3, words)(trained, batch)
        log_ensemble = ensemble(
            words.of(student.answer_logits(batch, per_row(prompt.embeddings, batch))),
            words.of(target.answer_logits(batch)),
            0.3,
        )
        scores = words.of(target.answer_logits(batch, per_row(trained, batch)))
        expected = losses.divergence(log_ensemble, scores.log_softmax(-1))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_target_scores_sum_the_plain_target_and_each_instruction(pair: tuple[LanguageModel, LanguageModel]) -> None:
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
        scores = [words.of(target.answer_logits(batch, per_row(prompt, batch))) for prompt in (None, *prompts)]
    seen: list[Progress] = []
    total = target_scores(target, encoded, words, TASK, on_progress=seen.append)
    assert [progress.step for progress in seen] == list(range(1, len(seen) + 1)), "one progress bar for all"
    assert {progress.steps for progress in seen} == {len(seen)}
    torch.testing.assert_close(total, ensemble_scores(scores), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(standard(total), standard(scores[0]), atol=0.05)


def test_an_instruction_that_lists_too_many_labels_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model()
    encoded, words = encode_rows(target, TASK, TEXTS), label_words(target, TASK)
    monkeypatch.setattr(prompt_ensemble, "MAX_INSTRUCTION_TOKENS", 1)
    scores = target_scores(target, encoded, words, TASK)
    torch.testing.assert_close(scores, standard(model_outputs(target, encoded, words)))


def test_several_instructions_rank_better_than_one() -> None:
    """Each has its own label bias and scale, which don't matter."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(2, (2000,), generator=generator)
    signal = torch.nn.functional.one_hot(truth, 2).float()
    scores = [
        scale * (signal + torch.randn(2000, 2, generator=generator)) + torch.tensor([bias, 0.0])
        for scale, bias in ((1.0, 3.0), (0.1, -1.0), (5.0, 2.0))
    ]
    combined = ensemble_scores(scores)
    accuracy = [float((balanced(each).argmax(1) == truth).float().mean()) for each in (*scores, combined)]
    assert accuracy[-1] > max(accuracy[:-1]) + 0.04


def test_transfer_to_the_student_itself_has_loss_0() -> None:
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
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        transfer(target, student, TASK, prompt, texts, config, on_progress=stop, checkpoint=tmp_path)
    resumed = transfer(target, student, TASK, prompt, texts, config, checkpoint=tmp_path)
    undisturbed = transfer(target, student, TASK, prompt, texts, config)
    assert resumed.first_loss == undisturbed.first_loss
    assert (resumed.chosen_step, resumed.held_out_loss) == (undisturbed.chosen_step, undisturbed.held_out_loss)
    assert torch.equal(resumed.prompt.embeddings, undisturbed.prompt.embeddings)


def test_a_checkpoint_of_another_model_or_task_is_not_resumed(tmp_path: Path) -> None:
    first, other = tiny_model(seed=1), tiny_model(seed=2)
    student, prompt = copy_student(first, [0, 3]), SoftPrompt.random(first, 4, seed=1)
    config = TransferOptions(steps=4, batch_size=4)

    def stop(progress: Progress) -> None:
        if progress.stage == "transfer" and progress.step == 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        transfer(first, student, TASK, prompt, TEXTS, config, on_progress=stop, checkpoint=tmp_path)
    for target, task in ((other, TASK), (first, Task("{text} It is", TASK.label_words))):
        result = transfer(target, student, task, prompt, TEXTS, config, checkpoint=tmp_path)
        undisturbed = transfer(target, student, task, prompt, TEXTS, config)
        assert torch.equal(result.prompt.embeddings, undisturbed.prompt.embeddings)


@pytest.mark.parametrize(
    ("method", "prompt_init", "initial"),
    [
        ("ensemble", None, "instruction"),
        ("ensemble", "source", "source"),
        ("paper", None, "source"),
        ("paper", "instruction", "instruction"),
    ],
)
def test_the_initial_prompt(
    pair: tuple[LanguageModel, LanguageModel], method: str, prompt_init: str | None, initial: str
) -> None:
    """With almost no learning rate, a step ends at the initial prompt."""
    target, student = pair
    prompt = SoftPrompt.random(student, 6, seed=1)
    config = TransferOptions(steps=1, learning_rate=1e-9, method=method, prompt_init=prompt_init)  # type: ignore[arg-type]
    embeddings = transfer(target, student, TASK, prompt, TEXTS, config).prompt.embeddings
    instruction = SoftPrompt.from_text(target, "Say whether each text is negative or positive.\n\nText: ", 6)
    torch.testing.assert_close(embeddings, (instruction if initial == "instruction" else prompt).embeddings)


def test_an_instruction_is_truncated_or_repeated_to_the_length_of_the_prompt() -> None:
    target = tiny_model()
    whole = target.embed(torch.tensor(target.tokenizer("it was good", add_special_tokens=False).input_ids))
    count = len(whole)
    longer = SoftPrompt.from_text(target, "it was good", 2 * count - 1).embeddings
    assert torch.equal(longer, torch.cat([whole[1:], whole]))
    assert torch.equal(SoftPrompt.from_text(target, "it was good", count - 1).embeddings, whole[:-1])


def test_the_learning_rate_depends_on_the_initial_prompt(pair: tuple[LanguageModel, LanguageModel]) -> None:
    """The first step of Adam moves every value by the learning rate."""
    target, student = pair
    prompt = SoftPrompt.random(student, 6, seed=1)
    for prompt_init, rate in (("instruction", 0.003), ("source", 0.03)):
        initial, moved = (
            transfer(
                target,
                student,
                TASK,
                prompt,
                TEXTS,
                TransferOptions(steps=1, prompt_init=prompt_init, learning_rate=learning_rate),  # type: ignore[arg-type]
            )
            for learning_rate in (1e-12, None)
        )
        distance = (moved.prompt.embeddings - initial.prompt.embeddings).abs().median()
        assert float(distance) == pytest.approx(rate, rel=0.05)


def test_a_generation_task_is_transferred_too() -> None:
    target = tiny_model()
    prompt = SoftPrompt.random(target, 4, seed=1)
    task = Task("{text} The film is")
    result = transfer(target, copy_student(target, [0, 3]), task, prompt, TEXTS, TransferOptions(steps=3, batch_size=4))
    assert result.prompt.length == 4


def test_alpha_is_computed_from_public_labels_by_eq_6_or_refused() -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4)
    assert 0.0 <= choose_alpha(target, student, TASK, prompt, ROWS) <= 1.0
    with pytest.raises(InvalidInput, match="give a number"):
        choose_alpha(target, student, TASK, prompt, [Row("x", "sports")])
    with pytest.raises(InvalidInput, match="give a number"):
        choose_alpha(target, student, Task("{text} Answer:"), prompt, ROWS)


def test_public_rows_are_drawn_at_random_not_taken_from_the_top() -> None:
    """The first rows of a file sorted by label have only one class."""
    rows = list(range(1000))
    drawn = sample_rows(rows, 100, seed=1)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 100
    assert 30 < sum(row < 500 for row in drawn) < 70
    assert drawn == sample_rows(rows, 100, seed=1)
    assert drawn != sample_rows(rows, 100, seed=2)
    assert sample_rows(rows, 1000) == sample_rows(rows, 5000) == rows


def test_alpha_uses_all_classes_of_a_sorted_file(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4)
    seen: list[set[str]] = []
    recording = lambda model, task, rows, *more, **options: (  # noqa: E731
        seen.append({str(row.label) for row in rows}) or evaluate(model, task, rows, *more, **options)
    )
    monkeypatch.setattr("post_shared.method.transfer.transfer.evaluate", recording)
    many = [Row(f"{row.text} {number}", row.label) for number, row in enumerate(ROWS * 5)]
    rows = sorted(many, key=lambda row: str(row.label))
    choose_alpha(target, student, TASK, prompt, rows, max_rows=len(rows) // 3, max_length=32)
    assert seen == [set(TASK.labels)] * 2


def test_mismatched_models_prompts_and_options_are_refused() -> None:
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
    log_probabilities = balanced(scores)
    shares = log_probabilities.exp().mean(0)
    torch.testing.assert_close(shares, torch.full((classes,), 1 / classes), rtol=0, atol=1e-3)
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(300))
    change = log_probabilities - scores
    shift = change - change[:, :1]
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-4)  # one constant per class


def test_the_ensemble_is_more_accurate_than_either_model() -> None:
    """The method's premise: independent errors cancel out, and the target's label bias doesn't matter."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(2, (2000,), generator=generator)
    signal = torch.nn.functional.one_hot(truth, 2).float()

    def accuracy(scores: Tensor) -> float:
        return float((scores.argmax(1) == truth).float().mean())

    student = signal + torch.randn(2000, 2, generator=generator)
    target = 0.1 * signal + 0.1 * torch.randn(2000, 2, generator=generator) - torch.tensor([1.0, 0.0])
    together = ensemble(student, target, 1.0)
    assert accuracy(target) < 0.6
    assert accuracy(together) > max(accuracy(balanced(student)), accuracy(balanced(target))) + 0.04
    alone = balanced(student, believed_shares(student))
    torch.testing.assert_close(ensemble(student, target, 0.0).argmax(1), alone.argmax(1))


def test_half_of_the_student_s_label_bias_is_kept() -> None:
    """The geometric mean of uniform and (0.8, 0.2) is (2/3, 1/3)."""
    student = torch.tensor([0.8, 0.2]).log() + torch.zeros(50, 1)
    torch.testing.assert_close(believed_shares(student), torch.tensor([2 / 3, 1 / 3]))
    generator = torch.Generator().manual_seed(0)
    unsure = student + torch.randn(50, 2, generator=generator)
    combined = ensemble(unsure, torch.randn(50, 2, generator=generator), 0.7)
    torch.testing.assert_close(combined.exp().mean(0), believed_shares(unsure), rtol=0, atol=1e-3)


def test_a_student_with_equal_scores_for_all_texts_gives_its_class_shares() -> None:
    same = torch.zeros(10, 2) + torch.tensor([1.0, -1.0])
    combined = ensemble(same, torch.randn(10, 2, generator=torch.Generator().manual_seed(0)), 0.5)
    torch.testing.assert_close(combined.exp(), believed_shares(same).expand(10, 2), rtol=0, atol=1e-3)


def test_nan_scores_are_refused() -> None:
    broken = torch.zeros(4, 2)
    broken[1, 0] = torch.nan
    for student, target in ((broken, torch.ones(4, 2)), (torch.ones(4, 2), broken)):
        with pytest.raises(InvalidInput, match="NaN or infinite"):
            ensemble(student, target, 1.0)


def test_a_student_with_another_tokenizer_is_refused() -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4)
    swapped = {" good": " awful"}

    class OtherTokenizer:
        def __getattr__(self, name: str) -> object:
            return getattr(target.tokenizer, name)

        def __call__(self, text: object, **options: object) -> object:
            return target.tokenizer(swapped.get(text, text) if isinstance(text, str) else text, **options)

    with pytest.raises(PromptMismatch, match="different tokens"):
        transfer(target, LanguageModel(student.model, OtherTokenizer()), TASK, prompt, TEXTS, TransferOptions(steps=1))


# --- the chosen step ----------------------------------------------------------------------------------


def many_texts(count: int) -> list[str]:
    return [f"{text} {number}" for number in range(-(-count // len(TEXTS))) for text in TEXTS][:count]


def test_rows_are_held_out_of_enough_only_and_never_trained_on() -> None:
    assert hold_out(63, seed=0) == (list(range(63)), [])
    trained, held_out = hold_out(1000, seed=0)
    assert len(held_out) == 64
    assert sorted(trained + held_out) == list(range(1000))
    assert hold_out(1000, seed=1)[1] != held_out
    encoded = encode_rows(tiny_model(), TASK, many_texts(80))
    batches = ShuffledBatches(encoded, 8, 0, rows=range(0, 80, 2))
    assert {row for step in range(20) for row in batches(step).index} == set(range(0, 80, 2))


def test_the_step_with_the_lowest_held_out_loss_is_chosen() -> None:
    batch = encode_rows(tiny_model(), TASK, TEXTS).batch(range(4))
    adam = PromptAdam(torch.nn.Parameter(torch.zeros(1, 1)), 0.1)
    best = BestStep(
        adam, lambda prompt, rows: (prompt - 0.52).square().expand(4, 1)[:, 0], batch, batch_size=2, steps=10
    )
    for _ in range(10):
        best.update(lambda prompt, rows: -prompt.expand(4, 1)[:, 0], batch)  # training passes the best prompt
    prompt, step, loss = best.chosen
    assert step == 5
    assert prompt.item() == pytest.approx(0.5, abs=1e-3)
    assert loss == pytest.approx(0.0004, abs=1e-4)


def test_a_transfer_reports_the_held_out_loss_of_its_prompt() -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4, seed=1)
    seen: dict[int, float] = {}

    def record(progress: Progress) -> None:
        if progress.stage == "transfer" and "held_out_loss" in progress.metrics:
            seen[progress.step] = progress.metrics["held_out_loss"]

    config = TransferOptions(steps=20, batch_size=8)
    result = transfer(target, student, TASK, prompt, many_texts(80), config, on_progress=record)
    assert result.held_out_loss == min(seen.values())
    assert seen[result.chosen_step] == result.held_out_loss
    fewer = transfer(target, student, TASK, prompt, many_texts(40), config)
    assert (fewer.chosen_step, fewer.held_out_loss) == (20, None)


@pytest.mark.parametrize("method", ["ensemble", "paper"])
def test_a_target_offloaded_to_disk_gets_the_same_prompt(method: str, tmp_path: Path) -> None:
    tiny_model().save(tmp_path)
    plain = LanguageModel.load(tmp_path, device="cpu")
    spread = LanguageModel.load(tmp_path, device="spread", memory={"cpu": 0})
    prompt, config = SoftPrompt.random(plain, 4), TransferOptions(steps=4, batch_size=4, method=method)
    results = []
    for target in (plain, spread):
        student = copy_student(target, [0, 3])
        assert not any(weight.is_meta for weight in student.model.parameters())
        assert choose_alpha(target, student, TASK, prompt, ROWS) == choose_alpha(plain, student, TASK, prompt, ROWS)
        results.append(transfer(target, student, TASK, prompt, TEXTS, config))
    torch.testing.assert_close(results[1].prompt.embeddings, results[0].prompt.embeddings, rtol=1e-4, atol=1e-5)
    assert results[1].last_loss == pytest.approx(results[0].last_loss, rel=1e-4)
