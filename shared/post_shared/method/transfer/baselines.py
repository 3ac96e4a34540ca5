"""Baselines of a transfer: the target without private rows, and logits combined at inference time.

*Calibrated zero-shot* is the target alone: no private row, no soft prompt, no training. It uses an ensemble of
instructions, and its label bias on public text is subtracted (contextual calibration, Zhao et al. 2021). *Proxy* adds
the student's change to the target's logits (Liu et al. 2024). Shapes: N texts, C classes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from post_shared.data.tasks import Task
from post_shared.errors import DataInvalid, InvalidInput
from post_shared.method.transfer.prompt_ensemble import instruction_prompts
from post_shared.method.transfer.teacher_outputs import model_outputs
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import label_words

PUBLIC_TEXTS = 256
"""Public texts on which a label bias is measured."""


def calibrated_scores(
    target: LanguageModel,
    task: Task,
    texts: Sequence[str],
    public: Sequence[str],
    *,
    ensemble: bool = True,
    max_length: int = 128,
    seed: int = 0,
) -> Tensor:
    """Class scores (N, C) of the target alone, minus its label bias on ``public`` texts.

    For the plain template and, with ``ensemble``, each instruction, scores are centred over the classes, their mean
    over the public texts is subtracted, and they are divided by their root mean square there. Then they are added up.

    Raises:
        InvalidInput: a generation task.
        DataInvalid: there is no public text.
    """
    _check_classes(task)
    drawn = _draw(list(dict.fromkeys(public)), PUBLIC_TEXTS, seed)
    words = label_words(target, task)
    both = encode_rows(target, task, [*texts, *drawn], max_length)
    prompts: list[SoftPrompt | None] = [None, *(instruction_prompts(target, both, task) if ensemble else [])]
    total = torch.zeros(len(texts), len(task.labels))
    for prompt in prompts:
        scores = model_outputs(target, both, words, prompt)  # (N + public, C)
        centred = scores - scores.mean(1, keepdim=True)
        own, reference = centred[: len(texts)], centred[len(texts) :]
        bias = reference.mean(0)  # (C,)
        spread = (reference - bias).pow(2).mean().sqrt().clamp_min(1e-12)
        total += (own - bias) / spread
    return total


def proxy_scores(
    target: LanguageModel,
    student: LanguageModel,
    task: Task,
    prompt: SoftPrompt,
    texts: Sequence[str],
    *,
    max_length: int = 128,
) -> Tensor:
    """Class scores (N, C) of Φt(x) + Φs(p_s + x) - Φs(x): the target's logits, moved as the prompt moves the student's.

    Raises:
        InvalidInput: a generation task.
    """
    _check_classes(task)
    encoded = encode_rows(target, task, list(texts), max_length, reserved=prompt.length)
    words = label_words(target, task)
    change = model_outputs(student, encoded, words, prompt) - model_outputs(student, encoded, words)
    return model_outputs(target, encoded, words) + change


def _check_classes(task: Task) -> None:
    if task.is_generation:
        raise InvalidInput("baselines compare classes; a generation task has none")


def _draw(texts: Sequence[str], limit: int, seed: int) -> list[str]:
    """At most ``limit`` texts, drawn with the seed, in order."""
    if not texts:
        raise DataInvalid("there is no public text to measure a label bias on")
    drawn = random.Random(f"label bias/{seed}").sample(range(len(texts)), min(limit, len(texts)))  # noqa: S311
    return [texts[index] for index in sorted(drawn)]
