"""What the target says about public texts by itself, asked in several words (``docs/explanation-method.md``).

One wording makes the target lean and err in its own way; the sum over wordings ranks texts better than each. They say
what the owner's prompt file says about the task, its labels and its template. They run once over the public texts,
and no step of the transfer costs more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from post_server.ml.constants import answers, in_turn
from post_server.ml.ensemble import standard
from post_shared.batches import EncodedRows
from post_shared.label_words import LabelWords
from post_shared.language_model import LanguageModel
from post_shared.prompt_tuning import template_words
from post_shared.soft_prompt import SoftPrompt
from post_shared.tasks import Task
from post_shared.training import Reporter, ignore

MOST_TOKENS = 64
"""Of a wording: one that lists more labels than fit is not used."""


def wordings(task: Task) -> list[str]:
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


def opinion(
    target: LanguageModel, encoded: EncodedRows, words: LabelWords | None, task: Task, *, report: Reporter = ignore
) -> Tensor:
    """Class scores (N, C) of the target by itself: as it is and behind each wording, which all count alike.

    Without ``words``, for Eq. 3, the logits (N, V) of the target as it is.
    """
    if words is None:
        return answers(target, encoded, None, report=report)
    prompts = (None, *asked(target, encoded, task))
    said = [
        answers(target, encoded, words, prompt, report=in_turn(report, at, len(prompts)))
        for at, prompt in enumerate(prompts)
    ]
    return together(said)


def asked(target: LanguageModel, encoded: EncodedRows, task: Task) -> list[SoftPrompt]:
    """The wordings as prompts, as far as they fit before the longest text."""
    most = min(MOST_TOKENS, target.max_length - encoded.whole.longest)
    return [prompt for text in wordings(task) if (prompt := _said(target, text, most))]


def together(said: Sequence[Tensor]) -> Tensor:
    """The sum of scores (N, C), each without its lean and brought to one spread."""
    return torch.stack([standard(scores) for scores in said]).sum(0)


def _said(target: LanguageModel, text: str, most: int) -> SoftPrompt | None:
    ids = target.tokenizer(text, add_special_tokens=False).input_ids
    return SoftPrompt(target.embed(torch.tensor(ids))) if 0 < len(ids) <= most else None
