"""The measured parts, each with POST's implementation first, then the references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from post_bench.speed.arithmetic import Arithmetic, distillation_step, prompt_step
from post_bench.speed.bench import Bench, Case, Race, Step, fresh, steps, tokens_of
from post_bench.speed.references import PeftPrompts, PeftTrainer, PublishedTransfer
from post_bench.speed.serving import mixed, mixed_generation
from post_client.privacy import PrivacyConfig, PrivacyPlan
from post_shared.data.batches import Batch, EncodedRows, ShuffledBatches
from post_shared.method.distillation.corpus import prepare_corpus
from post_shared.method.distillation.layer_selection import chosen_layers
from post_shared.method.distillation.objective import Objective
from post_shared.method.distillation.trainer import HEAD_SHARE, DistillationStep, Student, predictions
from post_shared.method.transfer.prompt_ensemble import instruction_prompts, target_scores
from post_shared.method.transfer.teacher_outputs import student_outputs, teacher_outputs
from post_shared.method.transfer.transfer import ensemble_objective, max_activation_bytes
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
"""The step of a worker on this machine, if the target has another dtype there."""
PRECOMPUTE_ROWS = 32
"""Texts per measurement of the teacher outputs."""


def transfer(bench: Bench) -> Race[Batch]:
    """A step of the transfer against the published loop's, on the same public texts."""
    target, config = bench.target, TransferOptions()
    alpha = float(config.alpha)
    prompt, words = bench.prompt(target), label_words(target, bench.task)
    outputs = teacher_outputs(target, bench.student, SoftPrompt(bench.prompt(bench.student)), bench.public_rows, words)

    def step(model: LanguageModel) -> Callable[[Batch], None]:
        loss = ensemble_objective(model, outputs, alpha, words)
        return steps(model, _adam(prompt, model, limit=max_activation_bytes(model)), loss, model.new_graphs())

    published = PublishedTransfer(target, bench.student, prompt, alpha=alpha, temperature=config.temperature)
    return Race(
        {**_ways(bench, step), "published": lambda batch: published.step(fresh(batch))},
        bench.batches(bench.public_rows, config.batch_size),
        lambda batch: prompt_step(target, tokens_of(batch), len(batch), bench.length),
        tokens_of,
    )


def precompute(bench: Bench, rows: int = PRECOMPUTE_ROWS) -> Race[Batch]:
    """The teacher outputs and target scores that a transfer precomputes, on ``rows`` texts."""
    target, student, words = bench.target, bench.student, label_words(bench.target, bench.task)
    prompt = SoftPrompt(bench.prompt(student))

    def step(model: LanguageModel) -> Callable[[Batch], None]:
        def compute(batch: Batch) -> None:
            encoded = EncodedRows(tuple(batch.encoded.rows[row] for row in batch.index))
            student_outputs(student, prompt, encoded, words)
            target_scores(model, encoded, words, bench.task)

        return compute

    instructions = instruction_prompts(target, bench.public_rows, bench.task)
    prompt_lengths = [0, *(instruction.length for instruction in instructions)]

    def flop(batch: Batch) -> float:
        tokens, heads = tokens_of(batch), len(batch)
        prompted = Arithmetic.of(student).forward(tokens + bench.length, heads)
        return prompted + sum(Arithmetic.of(target).forward(tokens + length, heads) for length in prompt_lengths)

    return Race(_ways(bench, step), ShuffledBatches(bench.public_rows, rows, seed=0), flop, tokens_of)


def tune(bench: Bench) -> Race[Batch]:
    """A tuning step, plain and with differential privacy, against PEFT with the Hugging Face Trainer."""
    return _tune(bench, bench.student)


def tune_target(bench: Bench) -> Race[Batch]:
    """The same on the target model: not allowed with private rows, but the reference of the journey."""
    return _tune(bench, bench.target)


def _tune(bench: Bench, model: LanguageModel) -> Race[Batch]:
    size, loss, start = bench.batch_size or PLAIN.batch_size, tuning_objective(model, bench.task), bench.prompt(model)
    plan = PrivacyPlan.make(PrivacyConfig(seed=0), 1000, batch_size=size, steps=100)
    optimizers: dict[str, PromptOptimizer] = {
        "post": _adam(start, model),
        "private": plan.optimizer(nn.Parameter(start.clone().to(model.device)), 0.01),
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
    """A whole step of ``post tune`` with its defaults, including the label bias."""
    start = bench.prompt(bench.student)

    def whole_step(student: LanguageModel) -> Callable[[Batch], None]:
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
        {"post": whole_step(bench.student)} | ({TEACHING: whole_step(bench.learner)} if bench.learner else {}),
        bench.batches(bench.private_rows, PLAIN.batch_size),
        lambda batch: prompt_step(bench.student, tokens_of(batch), len(batch), bench.length),
        tokens_of,
    )


def distil(bench: Bench) -> Race[int]:
    """A distillation step, against one with the vocabulary losses at every position, as in the paper."""
    target, config = bench.target, DistilOptions(steps=1)
    corpus = prepare_corpus(target, bench.corpus, config.sequence_length, None)
    layers = chosen_layers(bench.student.layers, target.layers, config.layer_pattern)

    def descent(teacher: LanguageModel, share: float = HEAD_SHARE) -> Callable[[int], None]:
        model = copy_student(target, layers)
        student = Student(model, learning_rate=1e-4, freeze_head=True, freeze_embeddings=True)
        run = DistillationStep(
            student, Objective(teacher, model, config.temperature), corpus, ALONE, config.rows, 1, 0, share
        )

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
    """Texts with one prompt each. ``token_ids`` are those of the texts in the task's template."""

    prompts: list[Tensor]
    texts: list[str]
    token_ids: list[list[int]]

    @classmethod
    def draw(cls, bench: Bench, *, count: int, length: int, tokens: int) -> Requests:
        """Random embeddings as prompts, and texts of about ``tokens`` tokens from the corpus."""
        model, generator = bench.target, torch.Generator().manual_seed(0)
        matrix = model.model.get_input_embeddings().weight.detach()
        rows = [torch.randint(len(matrix), (length,), generator=generator).to(matrix.device) for _ in range(count)]
        ids = model.tokenizer("\n".join(bench.corpus[: 50 * count]), add_special_tokens=False).input_ids
        while len(ids) < count * tokens:
            ids = ids + ids
        own = max(1, tokens - len(encode_rows(model, bench.task, [""]).rows[0].token_ids))
        texts = [model.tokenizer.decode(ids[n * tokens : n * tokens + own]).strip() for n in range(count)]
        encoded = encode_rows(model, bench.task, texts)
        return cls([matrix[row_ids].float().cpu() for row_ids in rows], texts, [row.token_ids for row in encoded.rows])

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_ids))


def predict(bench: Bench, *, count: int = 64, length: int = 100, tokens: int = 30) -> Race[int]:
    """One text for each of ``count`` prompts: all in one mixed batch, against PEFT's one prompt at a time."""
    model, requests = bench.target, Requests.draw(bench, count=count, length=length, tokens=tokens)
    peft_prompts = PeftPrompts(model, requests.prompts)

    def peft(_: int) -> None:
        for index, ids in enumerate(requests.token_ids):
            peft_prompts.logits(index, ids)

    return Race(
        {"post": mixed(model, bench.task, requests.prompts, requests.texts), "peft": peft},
        int,
        lambda _: Arithmetic.of(model).forward(requests.tokens, count),
        lambda _: requests.tokens,
    )


def generate(bench: Bench, *, count: int = 8, length: int = 100, tokens: int = 30, new: int = 16) -> Race[int]:
    """``new`` tokens after one text for each of ``count`` prompts, against PEFT's ``generate`` per request."""
    model, requests = bench.target, Requests.draw(bench, count=count, length=length, tokens=tokens)
    peft_prompts = PeftPrompts(model, requests.prompts)

    def peft(_: int) -> None:
        for index, ids in enumerate(requests.token_ids):
            peft_prompts.generate(index, ids, new)

    decoded = count * (new - 1)
    return Race(
        {"post": mixed_generation(model, requests.prompts, requests.token_ids, new), "peft": peft},
        int,
        lambda _: Arithmetic.of(model).forward(requests.tokens + decoded, count * new),
        lambda _: count * new,
    )


def _ways(bench: Bench, step: Callable[[LanguageModel], Step[Case]]) -> dict[str, Step[Case]]:
    """POST's step with the target in the common dtype, and in the dtype of a worker if that differs."""
    return {"post": step(bench.target)} | ({TEACHING: step(bench.teacher)} if bench.teacher else {})


def _adam(start: Tensor, model: LanguageModel, *, limit: int | None = None) -> PromptAdam:
    """The optimizer of the training loops, with micro-batches."""
    split = plan_step(model, longest=1, max_bytes=limit).cut(len(start), packed=runs_prompt_once(model, 1))
    return PromptAdam(nn.Parameter(start.clone().to(model.device)), 0.01, split)


PARTS: dict[str, Callable[[Bench], Race[Any]]] = {
    "transfer": transfer,
    "transfer_constants": precompute,
    "distil": distil,
    "tune": tune,
    "tune_whole": tune_whole,
    "tune_target": tune_target,
    "predict": predict,
    "generate": generate,
}
"""All parts by name; their docstrings say what they measure."""
