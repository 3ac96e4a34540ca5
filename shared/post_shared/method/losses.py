"""The paper's losses (Eq. 1-6) as pure functions. Shapes: P answer positions, V vocabulary, d hidden width.

Every loss that takes logits returns one value per position. Callers take the mean, so that the same function serves
batch means and per-example gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from post_shared.data.batches import IGNORE_INDEX

DISTILLATION_WEIGHTS = (5.0, 2.0, 1.0)
"""(α_ce, α_lm, α_cos), Table 8."""


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of logits softened by τ: (P, V) -> (P, V)."""
    return functional.log_softmax(logits.float() / temperature, dim=-1)


def divergence(log_target: Tensor, log_input: Tensor) -> Tensor:
    """KL(target || input) of log-probabilities: (P, V), (P, V) -> (P,)."""
    return functional.kl_div(log_input, log_target, reduction="none", log_target=True).sum(-1)


def softened_cross_entropy(teacher: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """L_ce of Eq. 1: KL between softened vocabulary distributions, times τ². Logits (P, V) -> (P,)."""
    return divergence(soften(teacher, temperature), soften(student, temperature)) * temperature**2


def language_model_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """L_lm of Eq. 1: the model's own objective at the predicted positions; 0 where the token is :data:`IGNORE_INDEX`.

    (P, V), (P,) -> (P,).
    """
    return functional.cross_entropy(logits, tokens, reduction="none", ignore_index=IGNORE_INDEX)


def cosine_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """L_cos of Eq. 1: 1 - cosine between last hidden states. (P, d), (P, d) -> (P,)."""
    return 1.0 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)


def distillation_loss(
    cross_entropy: Tensor,
    language_model: Tensor,
    cosine: Tensor,
    weights: tuple[float, float, float] = DISTILLATION_WEIGHTS,
) -> Tensor:
    """Eq. 1: α_ce·L_ce + α_lm·L_lm + α_cos·L_cos. Scalars in, scalar out."""
    ce, lm, cos = weights
    return ce * cross_entropy + lm * language_model + cos * cosine


def imitation_loss(target: Tensor, log_student: Tensor, temperature: float = 2.0) -> Tensor:
    """L1, Eq. 4: KL(Φs(p_s + x) || Φt(p_t + x)); the prompted student is the reference. (P, V), (P, V) -> (P,).

    ``target`` holds logits. ``log_student`` is constant: log-probabilities, softened once by :func:`soften`.
    """
    return divergence(log_student, soften(target, temperature))


def shift_loss(target: Tensor, target_plain: Tensor, log_student_shift: Tensor, temperature: float = 2.0) -> Tensor:
    """L2, Eq. 5: KL between the *changes* that the prompts make: differences of logits, softened. (P, V) each -> (P,).

    ``target`` holds the logits Φt(p_t + x), ``target_plain`` the logits Φt(x). ``log_student_shift`` is constant:
    log-probabilities of Φs(p_s + x) - Φs(x), softened once by :func:`soften`.
    """
    return divergence(log_student_shift, soften(target - target_plain, temperature))


def transfer_loss(imitation: Tensor, shift: Tensor, alpha: float) -> Tensor:
    """Eq. 3: (1 - α)·L1 + α·L2. Same shapes in and out."""
    return (1.0 - alpha) * imitation + alpha * shift


def alpha_heuristic(zero_shot: float, prompted_student: float, random_guess: float) -> float:
    """Eq. 6: α̃ = min((ZS - RG) / (C - RG), 1), clamped to [0, 1].

    Accuracies: ``zero_shot`` (ZS) of Φt without a prompt, ``prompted_student`` (C) of Φs with its prompt, and
    ``random_guess`` (RG). A student no better than guessing offers nothing to imitate: α = 1.
    """
    if prompted_student <= random_guess:
        return 1.0
    return min(max((zero_shot - random_guess) / (prompted_student - random_guess), 0.0), 1.0)


def label_word_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of class scores (means over label words, Table 9) against labels. (B, C), (B,) -> (B,)."""
    return functional.cross_entropy(scores, labels, reduction="none")


def answer_loss(logits: Tensor, tokens: Tensor, rows: Tensor, batch_size: int) -> Tensor:
    """Teacher-forced loss of generation (§5.3): the mean over each row's answer tokens. (P, V), (P,), (P,) -> (B,)."""
    losses = language_model_loss(logits, tokens)  # (P,)
    total = torch.zeros(batch_size, device=losses.device).index_add(0, rows, losses)
    count = torch.zeros(batch_size, device=losses.device).index_add(0, rows, torch.ones_like(losses))
    return total / count.clamp_min(1.0)
