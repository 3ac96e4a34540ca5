"""The label words of a task as tokens of one model, and class scores from their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from post_shared.data.tasks import Task
from post_shared.errors import TaskInvalid
from post_shared.model.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class LabelWords:
    """The label words of a task as tokens of one model: K distinct tokens, C labels."""

    token_ids: Tensor
    """(K,)"""
    weights: Tensor
    """(C, K): 1/n where token k is one of the n words of class c, else 0."""

    def scores(self, logits: Tensor) -> Tensor:
        """Class scores from logits at :attr:`token_ids`, the mean over a class's words (Table 9): (B, K) -> (B, C)."""
        return logits @ self.weights.to(logits.device).T

    def of(self, logits: Tensor) -> Tensor:
        """Class scores from logits over the vocabulary: (B, V) -> (B, C)."""
        return self.scores(logits[:, self.token_ids.to(logits.device)])


def label_words(model: LanguageModel, task: Task) -> LabelWords:
    """Find the token of each label word, as it follows the template.

    A word that this model's tokenizer splits into several tokens, or doesn't know, is left out as long as its label
    has another one, so a task with several words per label fits many models. A student has the target's tokenizer, so
    both sides leave out the same words.

    Raises:
        TaskInvalid: a label has no usable word, or shares a token with another label.
    """
    words = task.label_words or {}
    used_by: dict[int, tuple[str, str]] = {}
    columns: list[list[int]] = []
    for label, candidates in words.items():
        column: list[int] = []
        refused: list[TaskInvalid] = []
        for word in candidates:
            try:
                token = _single_token(model, label, word)
            except TaskInvalid as error:
                refused.append(error)
                continue
            other = used_by.setdefault(token, (label, word))
            if other[0] != label:
                raise TaskInvalid(
                    f"label words {other[1]!r} ({other[0]}) and {word!r} ({label}) are the same token in this "
                    "model's tokenizer, so the classes can't be distinguished; choose another word"
                )
            if token not in column:
                column.append(token)
        if not column:
            raise refused[0]
        columns.append(column)
    tokens = list(used_by)
    weights = torch.zeros(len(columns), len(tokens))
    for row, column in enumerate(columns):
        for token in column:
            weights[row, tokens.index(token)] = 1.0 / len(column)
    return LabelWords(torch.tensor(tokens), weights)


def _single_token(model: LanguageModel, label: str, word: str) -> int:
    tokenizer: Any = model.tokenizer
    ids = tokenizer(" " + word.strip(), add_special_tokens=False).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if len(ids) == 2 and not tokenizer.decode([ids[0]]).strip():  # some tokenizers make the space a token
        ids = tokenizer(word.strip(), add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise TaskInvalid(
            f"label word {word!r} of label {label!r} takes {len(ids)} tokens {pieces} in this model's tokenizer; "
            "at least one of the label's words must be a single token: choose a shorter or more common word"
        )
    if ids[0] == tokenizer.unk_token_id:
        raise TaskInvalid(f"label word {word!r} of label {label!r} is unknown to this model's tokenizer")
    return int(ids[0])
