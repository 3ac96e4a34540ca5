"""The floating-point operations that each algorithm needs, counted: no padding, nothing that is computed for nobody.

A token's pass forward through the layers takes two operations for each weight of their matrices; a pass backward to
the activations takes the same again, and one to the weights once more. Attention's own products are left out (2 % at
texts of 30 tokens), so that a share of the limit errs to the low side.
"""

from __future__ import annotations

from dataclasses import dataclass

from post_shared.model.language_model import LanguageModel


@dataclass(frozen=True)
class Arithmetic:
    """Operations of one model: ``layers`` for each token that passes through, ``head`` for each predicted position."""

    layers: float
    head: float

    @classmethod
    def of(cls, model: LanguageModel) -> Arithmetic:
        matrices = [w for name, w in model.body.named_parameters() if w.dim() == 2 and "embed" not in name]
        return cls(2.0 * sum(w.numel() for w in matrices), 2.0 * model.vocabulary * model.hidden_size)

    def forward(self, tokens: float, heads: float) -> float:
        return tokens * self.layers + heads * self.head

    def to_prompt(self, tokens: float, heads: float) -> float:
        """Forward, and backward to the activations: a step that trains a prompt."""
        return 2.0 * self.forward(tokens, heads)

    def to_weights(self, tokens: float, heads: float) -> float:
        """Forward, backward to the activations, and to the layers' weights (the head is frozen): a student's step."""
        return self.to_prompt(tokens, heads) + tokens * self.layers


def prompt_step(model: LanguageModel, tokens: int, rows: int, length: int) -> float:
    """A step of tuning (Φs) or of the transfer (Φt): one pass forward and back over ``rows`` texts of ``tokens`` in
    all, and their prompt once."""
    return Arithmetic.of(model).to_prompt(tokens + length, rows)


def distillation_step(target: LanguageModel, student: LanguageModel, tokens: int, heads: int) -> float:
    """Φt forward; Φs forward and back to its weights; the head of both at ``heads`` positions."""
    return Arithmetic.of(target).forward(tokens, heads) + Arithmetic.of(student).to_weights(tokens, heads)
