"""A soft prompt: l embedding vectors that are prepended to the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from post_shared.errors import InvalidInput
from post_shared.model.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """``embeddings`` is float32 (l, d), on the CPU: the form in which a prompt is stored and sent."""

    embeddings: Tensor

    def __post_init__(self) -> None:
        if self.embeddings.dim() != 2 or 0 in self.embeddings.shape:
            raise InvalidInput(f"a prompt is a matrix [length, width], not {tuple(self.embeddings.shape)}")
        if not torch.isfinite(self.embeddings).all():
            raise InvalidInput("the prompt contains NaN or infinite values; tune with a lower learning rate")
        plain = self.embeddings.detach().to("cpu", torch.float32).contiguous()
        object.__setattr__(self, "embeddings", plain)

    @property
    def length(self) -> int:
        return int(self.embeddings.shape[0])

    @property
    def width(self) -> int:
        return int(self.embeddings.shape[1])

    @classmethod
    def from_text(cls, model: LanguageModel, text: str, length: int) -> SoftPrompt:
        """The embeddings of ``text``, such as an instruction, truncated to ``length`` vectors or repeated from the end.

        Raises:
            InvalidInput: the text has no tokens, or ``length`` isn't positive.
        """
        _check_length(length)
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise InvalidInput(f"the text {text!r} has no tokens to start a prompt from")
        filled = (ids * -(-length // len(ids)))[-length:] if len(ids) < length else ids[:length]
        return cls(model.embed(torch.tensor(filled)))

    @classmethod
    def random(cls, model: LanguageModel, length: int, seed: int = 0) -> SoftPrompt:
        """The embeddings of ``length`` random tokens of the vocabulary."""
        _check_length(length)
        generator = torch.Generator().manual_seed(seed)
        return cls(model.embed(torch.randint(model.vocabulary, (length,), generator=generator)))


def _check_length(length: int) -> None:
    if length < 1:
        raise InvalidInput(f"a prompt has at least one vector, not {length}")
