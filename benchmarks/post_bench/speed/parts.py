"""The measured parts: for each, POST's own way first and the plain references beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from post_bench.speed.arithmetic import Arithmetic, distillation_step, prompt_step
from post_bench.speed.bench import Bench, Case, Race, Way, fresh, steps, tokens_of
from post_bench.speed.references import PeftPrompts, PeftTrainer, PublishedTransfer
from post_bench.speed.serving import mixed, mixed_generation
from post_client.privacy import PrivacyConfig, PrivacyPlan
from post_shared.data.batches import Batch, EncodedRows, ShuffledBatches
from post_shared.method.distillation.corpus import prepare_corpus
from post_shared.method.distillation.layer_selection import chosen_layers
from post_shared.method.distillation.objective import Objective
from post_shared.method.distillation.trainer import HEAD_SHARE, Descent, Student, predictions
from post_shared.method.transfer.prompt_ensemble import instruction_prompts, target_scores
from post_shared.method.transfer.teacher_outputs import student_outputs, teacher_outputs
from post_shared.method.transfer.transfer import ensemble_objective, max_kept_bytes
from post_shared.method.tuning.tune import calibrated_loss, tuning_objective
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.model.memory_plan import plan_step, runs_prompt_once
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import label_words
from post_shared.schemas.distillations import DistilOptions
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import PLAIN
from post_shared.training.distributed import ALONE
from post_shared.training.optimizer import PromptAdam, PromptOptimizer

TEACHING = "teaching"
"""The way in which a worker on this machine makes a step, where the target then computes in another type."""
CONSTANT_ROWS = 32
"""Texts of one measurement of a transfer's constants."""


def transfer(bench: Bench) -> Race[Batch]:
    """A step of the transfer against the published loop's, on the same public texts."""
    target, config = bench.target, TransferOptions()
    alpha = float(config.alpha)
    prompt, words = bench.prompt(target), label_words(target, bench.task)
    known = teacher_outputs(target, bench.student, SoftPrompt(bench.prompt(bench.student)), bench.public_rows, words)

    def step(model: LanguageModel) -> Callable[[Batch], None]:
        loss = ensemble_objective(model, known, alpha, words)
        return steps(model, _adam(prompt, model, most=max_kept_bytes(model)), loss, model.new_graphs())

    theirs = PublishedTransfer(target, bench.student, prompt, alpha=alpha, temperature=config.temperature)
    return Race(
        {**_ways(bench, step), "published": lambda batch: theirs.step(fresh(batch))},
        bench.batches(bench.public_rows, config.batch_size),
        lambda batch: prompt_step(target, tokens_of(batch), len(batch), bench.length),
        tokens_of,
    )


def transfer_constants(bench: Bench, rows: int = CONSTANT_ROWS) -> Race[Batch]:
    """What is computed once before a transfer, on as many texts as a batch has."""
    target, student, words = bench.target, bench.student, label_words(bench.target, bench.task)
    prompt = SoftPrompt(bench.prompt(student))

    def way(model: LanguageModel) -> Callable[[Batch], None]:
        def compute(batch: Batch) -> None:
            some = EncodedRows(tuple(batch.encoded.rows[at] for at in batch.index))
            student_outputs(student, prompt, some, words)
            target_scores(model, some, words, bench.task)

        return compute

    said = [0, *(each.length for each in instruction_prompts(target, bench.public_rows, bench.task))]

    def flop(batch: Batch) -> float:
        tokens, heads = tokens_of(batch), len(batch)
        prompted = Arithmetic.of(student).forward(tokens + bench.length, heads)
        return prompted + sum(Arithmetic.of(target).forward(tokens + length, heads) for length in said)

    return Race(_ways(bench, way), ShuffledBatches(bench.public_rows, rows, seed=0), flop, tokens_of)


def tune(bench: Bench) -> Race[Batch]:
    """A step of tuning, plainly and with differential privacy, against PEFT's with the Hugging Face Trainer."""
    return _tune(bench, bench.student)


def tune_target(bench: Bench) -> Race[Batch]:
    """The same on the target model: what nobody may do with private rows, and what the journey is measured against."""
    return _tune(bench, bench.target)


def _tune(bench: Bench, model: LanguageModel) -> Race[Batch]:
    size, loss, start = bench.batch_size or PLAIN.batch_size, tuning_objective(model, bench.task), bench.prompt(model)
    plan = PrivacyPlan.make(PrivacyConfig(seed=0), 1000, batch_size=size, steps=100)
    optimizers: dict[str, PromptOptimizer] = {
        "post": _adam(start, model),
        "private": plan.optimizer(
            nn.Parameter(start.clone().to(model.device)),
            0.01,
            longest=bench.max_length,
            student=model,
        ),
    }
    ways: dict[str, Any] = {
        name: steps(model, optimizer, loss, model.new_graphs()) for name, optimizer in optimizers.items()
    }
    peft = PeftTrainer(model, bench.task, length=bench.length)
    return Race(
        {**ways, "peft": peft.seconds},
        bench.batches(bench.private_rows, size),
        lambda batch: prompt_step(model, tokens_of(batch), len(batch), bench.length),
        tokens_of,
    )


def tune_whole(bench: Bench) -> Race[Batch]:
    """A whole step of ``post tune`` with its defaults, the lean included."""
    start = bench.prompt(bench.student)

    def way(student: LanguageModel) -> Callable[[Batch], None]:
        optimizer = _adam(start, student)
        calibrated = calibrated_loss(student, bench.task, bench.private, None, PLAIN, private=False)
        step = steps(student, optimizer, calibrated or tuning_objective(student, bench.task), student.new_graphs())
        numbers = iter(range(1_000_000))

        def update(batch: Batch) -> None:
            if calibrated is not None:
                calibrated.measure(next(numbers), optimizer.prompt)
            step(batch)

        return update

    return Race(
        {"post": way(bench.student)} | ({TEACHING: way(bench.learner)} if bench.learner else {}),
        bench.batches(bench.private_rows, PLAIN.batch_size),
        lambda batch: prompt_step(bench.student, tokens_of(batch), len(batch), bench.length),
        tokens_of,
    )


def distil(bench: Bench) -> Race[int]:
    """A step of distillation; beside it, the vocabulary losses at every position, as the paper takes them."""
    target, config = bench.target, DistilOptions(steps=1)
    corpus = prepare_corpus(target, bench.corpus, config.sequence_length, None)
    kept = chosen_layers(bench.student.layers, target.layers, config.layer_pattern)

    def descent(teacher: LanguageModel, share: float = HEAD_SHARE) -> Callable[[int], None]:
        model = copy_student(target, kept)
        student = Student(model, learning_rate=1e-4, freeze_head=True, freeze_embeddings=True)
        run = Descent(student, Objective(teacher, model, config.temperature), corpus, ALONE, config.rows, 1, 0, share)

        def step(number: int) -> None:
            run.gradients(number)
            student.step(1e-4)

        return step

    def heads(step: int) -> int:
        return len(predictions(target, corpus, step, config.rows, 0, HEAD_SHARE).rows)

    size = config.rows * config.sequence_length
    return Race(
        {**_ways(bench, descent), "every_position": descent(target, 1.0)},
        int,
        lambda step: distillation_step(target, bench.student, size, heads(step)),
        lambda step: size,
    )


@dataclass(frozen=True)
class Requests:
    """As many prompts as texts, one each. ``token_ids`` are those of the texts in the task's template."""

    prompts: list[Tensor]
    texts: list[str]
    token_ids: list[list[int]]

    @classmethod
    def draw(cls, bench: Bench, *, count: int, length: int, tokens: int) -> Requests:
        """Rows of the vocabulary as prompts, and the corpus's own words as texts of about ``tokens`` tokens."""
        model, generator = bench.target, torch.Generator().manual_seed(0)
        matrix = model.model.get_input_embeddings().weight.detach()
        rows = [torch.randint(len(matrix), (length,), generator=generator).to(matrix.device) for _ in range(count)]
        ids = model.tokenizer("\n".join(bench.corpus[: 50 * count]), add_special_tokens=False).input_ids
        while len(ids) < count * tokens:
            ids = ids + ids
        own = max(1, tokens - len(encode_rows(model, bench.task, [""]).rows[0].token_ids))
        texts = [model.tokenizer.decode(ids[at * tokens : at * tokens + own]).strip() for at in range(count)]
        encoded = encode_rows(model, bench.task, texts)
        return cls([matrix[some].float().cpu() for some in rows], texts, [row.token_ids for row in encoded.rows])

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_ids))


def predict(bench: Bench, *, count: int = 64, length: int = 100, tokens: int = 30) -> Race[int]:
    """One text for each of ``count`` prompts: all mixed in a batch, against PEFT's one prompt at a time."""
    model, asked = bench.target, Requests.draw(bench, count=count, length=length, tokens=tokens)
    theirs = PeftPrompts(model, asked.prompts)

    def peft(_: int) -> None:
        for at, ids in enumerate(asked.token_ids):
            theirs.logits(at, ids)

    return Race(
        {"post": mixed(model, bench.task, asked.prompts, asked.texts), "peft": peft},
        int,
        lambda _: Arithmetic.of(model).forward(asked.tokens, count),
        lambda _: asked.tokens,
    )


def generate(bench: Bench, *, count: int = 8, length: int = 100, tokens: int = 30, new: int = 16) -> Race[int]:
    """``new`` tokens behind one text for each of ``count`` prompts, against PEFT's ``generate`` per request."""
    model, asked = bench.target, Requests.draw(bench, count=count, length=length, tokens=tokens)
    theirs = PeftPrompts(model, asked.prompts)

    def peft(_: int) -> None:
        for at, ids in enumerate(asked.token_ids):
            theirs.generate(at, ids, new)

    made = count * (new - 1)
    return Race(
        {"post": mixed_generation(model, asked.prompts, asked.token_ids, new), "peft": peft},
        int,
        lambda _: Arithmetic.of(model).forward(asked.tokens + made, count * new),
        lambda _: count * new,
    )


def _ways(bench: Bench, way: Callable[[LanguageModel], Way[Case]]) -> dict[str, Way[Case]]:
    """POST's way with the target in the type that everything else is timed in, and as it teaches if that differs."""
    return {"post": way(bench.target)} | ({TEACHING: way(bench.teacher)} if bench.teacher else {})


def _adam(start: Tensor, model: LanguageModel, *, most: int | None = None) -> PromptAdam:
    """As the loops make it, in micro-batches."""
    split = plan_step(model, longest=1, most=most).cut(len(start), packed=runs_prompt_once(model, 1))
    return PromptAdam(nn.Parameter(start.clone().to(model.device)), 0.01, split)


PARTS: dict[str, Callable[[Bench], Race[Any]]] = {
    "transfer": transfer,
    "transfer_constants": transfer_constants,
    "distil": distil,
    "tune": tune,
    "tune_whole": tune_whole,
    "tune_target": tune_target,
    "predict": predict,
    "generate": generate,
}
"""Every part by name; what they measure is in their docstrings."""
