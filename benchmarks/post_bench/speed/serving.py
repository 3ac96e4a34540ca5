"""POST's serving path, as in the predictor, for timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from post_shared.data.tasks import Task
from post_shared.inference.classification import ServedPrompt, classify_mixed
from post_shared.inference.generation import Decoder, DecodingRow
from post_shared.model.language_model import LanguageModel


def mixed(model: LanguageModel, task: Task, prompts: Sequence[Tensor], texts: Sequence[str]) -> Callable[[int], None]:
    """Class probabilities of each text with its own prompt, which has been prepared before."""
    served = [ServedPrompt.of(model, task, prompt) for prompt in prompts]

    def step(_: int) -> None:
        classify_mixed(model, texts, served)

    return step


def mixed_generation(
    model: LanguageModel, prompts: Sequence[Tensor], token_ids: Sequence[list[int]], new_tokens: int
) -> Callable[[int], None]:
    """Greedy continuations of each text with its own prompt, which has been prepared before."""
    prefixes = [model.prefix(prompt) for prompt in prompts]

    def step(_: int) -> None:
        decoder = Decoder(model)
        decoder.add([DecodingRow(ids, prefix, new_tokens) for ids, prefix in zip(token_ids, prefixes, strict=True)])
        while decoder.rows:
            decoder.step()

    return step
