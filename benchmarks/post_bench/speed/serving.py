"""POST's own serving path, as the predictor goes it, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from post_shared.batches import EncodedRow, EncodedRows
from post_shared.language_model import LanguageModel


def mixed(model: LanguageModel, prompts: Sequence[Tensor], token_ids: Sequence[list[int]]) -> Callable[[int], None]:
    """The logits behind each text with its own prompt. The prompts' prefixes are there, as for a second request."""
    kept = [model.prefix(prompt) for prompt in prompts]
    rows = EncodedRows(tuple(EncodedRow(ids, [len(ids) - 1], [], None) for ids in token_ids))

    def way(_: int) -> None:
        for at, prefix in enumerate(kept):
            model.answer_logits_after(rows.batch([at]), prefix)

    return way


def mixed_generation(
    model: LanguageModel, prompts: Sequence[Tensor], token_ids: Sequence[list[int]], new_tokens: int
) -> Callable[[int], None]:
    """Greedy continuations of each text behind its own prompt."""

    def way(_: int) -> None:
        for prompt, ids in zip(prompts, token_ids, strict=True):
            model.generate([ids], prompt, new_tokens)

    return way
