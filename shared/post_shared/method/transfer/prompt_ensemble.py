"""The target's own class scores of public texts, summed over an ensemble of instructions.

Not in the paper (figures: ``docs/explanation-method.md``). With each instruction the target has another label bias and
other errors; the sum ranks texts better than each. Instructions are built from what the owner's prompt file contains:
the task's labels and template. They run once over the public texts, so no step of the transfer costs more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from post_shared.data.batches import EncodedRows
from post_shared.data.tasks import Task
from post_shared.method.transfer.ensemble import standard
from post_shared.method.transfer.teacher_outputs import model_outputs, progress_of_pass
from post_shared.method.tuning.tune import template_words
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import LabelWords
from post_shared.training.progress import ProgressCallback, ignore

MAX_INSTRUCTION_TOKENS = 64
"""A longer instruction, one that lists many labels, is left out."""


def instructions(task: Task) -> list[str]:
    """Texts that state a classification task; p_t is initialised from the first.

    >>> instructions(Task("{text} It was", {"bad": ["terrible"], "good": ["great"]}))[0]
    'Say whether each text is bad or good.\\n\\nText: '
    """
    options = " or ".join(task.labels)
    return [
        f"Say whether each text is {options}.\n\nText: ",
        f"{options}? {template_words(task)}",
        f"Labels: {', '.join(task.labels)}.\n",
    ]


def target_scores(
    target: LanguageModel,
    encoded: EncodedRows,
    words: LabelWords | None,
    task: Task,
    *,
    on_progress: ProgressCallback = ignore,
) -> Tensor:
    """Class scores (N, C) of the target without p_t: the equally weighted sum without and with each instruction.

    Without ``words``, for Eq. 3, the plain logits Φt(x) (N, V).
    """
    if words is None:
        return model_outputs(target, encoded, None, on_progress=on_progress)
    prompts = (None, *instruction_prompts(target, encoded, task))
    scores = [
        model_outputs(target, encoded, words, prompt, on_progress=progress_of_pass(on_progress, index, len(prompts)))
        for index, prompt in enumerate(prompts)
    ]
    return ensemble_scores(scores)


def instruction_prompts(target: LanguageModel, encoded: EncodedRows, task: Task) -> list[SoftPrompt]:
    """The instructions as prompts, those that fit before the longest text."""
    max_tokens = min(MAX_INSTRUCTION_TOKENS, target.max_length - encoded.whole.longest)
    return [prompt for text in instructions(task) if (prompt := _embedded(target, text, max_tokens))]


def ensemble_scores(scores: Sequence[Tensor]) -> Tensor:
    """The sum of scores (N, C) of each prompt, standardised: without label bias, on one scale."""
    return torch.stack([standard(each) for each in scores]).sum(0)


def _embedded(target: LanguageModel, text: str, max_tokens: int) -> SoftPrompt | None:
    ids = target.tokenizer(text, add_special_tokens=False).input_ids
    return SoftPrompt(target.embed(torch.tensor(ids))) if 0 < len(ids) <= max_tokens else None
