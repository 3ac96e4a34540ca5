"""What the target says about public texts by itself, asked in several words (``docs/explanation-method.md``).

One wording makes the target lean and err in its own way; the sum over wordings ranks texts better than each. They say
what the owner's prompt file says about the task, its labels and its template. They run once over the public texts,
and no step of the transfer costs more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from post_shared.data.batches import EncodedRows
from post_shared.data.tasks import Task
from post_shared.method.transfer.ensemble import standard
from post_shared.method.transfer.teacher_outputs import in_turn, model_outputs
from post_shared.method.tuning.tune import template_words
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import LabelWords
from post_shared.training.progress import ProgressCallback, ignore

MAX_INSTRUCTION_TOKENS = 64
"""Of a wording: one that lists more labels than fit is not used."""


def instructions(task: Task) -> list[str]:
    """Texts that state a classification task; the first one is where p_t starts.

    >>> wordings(Task("{text} It was", {"bad": ["terrible"], "good": ["great"]}))[0]
    'Say whether each text is bad or good.\\n\\nText: '
    """
    either = " or ".join(task.labels)
    return [
        f"Say whether each text is {either}.\n\nText: ",
        f"{either}? {template_words(task)}",
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
    """Class scores (N, C) of the target by itself: as it is and behind each wording, which all count alike.

    Without ``words``, for Eq. 3, the logits (N, V) of the target as it is.
    """
    if words is None:
        return model_outputs(target, encoded, None, on_progress=on_progress)
    prompts = (None, *instruction_prompts(target, encoded, task))
    said = [
        model_outputs(target, encoded, words, prompt, on_progress=in_turn(on_progress, at, len(prompts)))
        for at, prompt in enumerate(prompts)
    ]
    return ensemble_scores(said)


def instruction_prompts(target: LanguageModel, encoded: EncodedRows, task: Task) -> list[SoftPrompt]:
    """The wordings as prompts, as far as they fit before the longest text."""
    most = min(MAX_INSTRUCTION_TOKENS, target.max_length - encoded.whole.longest)
    return [prompt for text in instructions(task) if (prompt := _said(target, text, most))]


def ensemble_scores(said: Sequence[Tensor]) -> Tensor:
    """The sum of scores (N, C), each without its lean and brought to one spread."""
    return torch.stack([standard(scores) for scores in said]).sum(0)


def _said(target: LanguageModel, text: str, most: int) -> SoftPrompt | None:
    ids = target.tokenizer(text, add_special_tokens=False).input_ids
    return SoftPrompt(target.embed(torch.tensor(ids))) if 0 < len(ids) <= most else None
