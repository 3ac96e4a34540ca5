"""The floating-point operations that each algorithm needs, without padding and unused results.

The forward pass of a token takes two operations per weight of the layers' matrices. The backward pass takes as many
for the gradients of the activations, and as many again for those of the weights. Attention's own products are left
out (2 % for texts of 30 tokens), so the share of the limit is slightly underestimated.
"""

from __future__ import annotations

from dataclasses import dataclass

from post_shared.model.language_model import LanguageModel


@dataclass(frozen=True)
class Arithmetic:
    """Operations of one model: ``layers`` per token, ``head`` per predicted position."""

    layers: float
    head: float

    @classmethod
    def of(cls, model: LanguageModel) -> Arithmetic:
        matrices = [w for name, w in model.body.named_parameters() if w.dim() == 2 and "embed" not in name]
        return cls(2.0 * sum(w.numel() for w in matrices), 2.0 * model.vocabulary * model.hidden_size)

    def forward(self, tokens: float, heads: float) -> float:
        return tokens * self.layers + heads * self.head

    def to_prompt(self, tokens: float, heads: float) -> float:
        """Forward and backward pass with gradients of the activations only: a step that trains a prompt."""
        return 2.0 * self.forward(tokens, heads)

    def to_weights(self, tokens: float, heads: float) -> float:
        """As :meth:`to_prompt`, plus gradients of the layers' weights (the LM head is frozen): a student's step."""
        return self.to_prompt(tokens, heads) + tokens * self.layers


def prompt_step(model: LanguageModel, tokens: int, rows: int, length: int) -> float:
    """A step of tuning (Φs) or transfer (Φt) on ``rows`` texts of ``tokens`` tokens in all, with one shared prompt."""
    return Arithmetic.of(model).to_prompt(tokens + length, rows)


def distillation_step(target: LanguageModel, student: LanguageModel, tokens: int, heads: int) -> float:
    """Forward pass of Φt, forward and backward pass of Φs, and the LM heads of both at ``heads`` positions."""
    return Arithmetic.of(target).forward(tokens, heads) + Arithmetic.of(student).to_weights(tokens, heads)
