"""The class distribution that the target learns to imitate: the prompted student's and the target's scores, combined.

Not in the paper; figures are in ``docs/explanation-method.md``. The student has learnt the task from private data but
is weak; the target is strong but doesn't know the task. Their errors differ, so the combination ranks texts better than
either. On text of another domain, each has a label bias. The target's says nothing about the task and is removed; of
the student's, which may also reflect the texts' classes, half is kept (:func:`believed_shares`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from post_shared.errors import InvalidInput

ROUNDS = 200
TOLERANCE = 1e-4


def ensemble(student: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Log-probabilities (N, C) from class scores (N, C) of the prompted student and of the target without a prompt.

    Both are standardised and added with weights 1 and α (α̃ of Eq. 6: how far the target is trusted). The sum gets the
    student's scale: it is no more confident than the model that has learnt the task.

    Raises:
        InvalidInput: a score is NaN or infinite.
    """
    if not (torch.isfinite(student).all() and torch.isfinite(target).all()):
        raise InvalidInput(
            "the outputs for public texts are NaN or infinite: the prompt's values are too large, or a model is broken"
        )
    student_scores, target_scores = standard(student), standard(target)
    combined = student_scores + alpha * target_scores
    return balanced(standard(combined) * _scale(student), believed_shares(student))


def believed_shares(student: Tensor) -> Tensor:
    """The assumed share of each class among the public texts (C,): the geometric mean of uniform and the student's.

    Public texts may well have more of one class: among tweets, more are about sports than about business. The student
    knows the classes and sees that, but has a label bias on text that it wasn't tuned for.
    """
    log_counts = torch.log_softmax(student, 1).logsumexp(0)
    return torch.softmax(log_counts / 2, 0)


def balanced(scores: Tensor, shares: Tensor | None = None) -> Tensor:
    """Log-probabilities (N, C) of scores (N, C) plus a constant per class, such that the classes have ``shares`` (C,).

    By default the shares are equal. The constants are found by fixed-point iteration, which raises the likelihood of a
    convex problem and so converges.
    """
    log_share = torch.full((scores.shape[1],), 1.0 / scores.shape[1]).log() if shares is None else shares.log()
    shift = torch.zeros(scores.shape[1])
    for _ in range(ROUNDS):
        gap = log_share - torch.log_softmax(scores + shift, 1).logsumexp(0) + torch.tensor(len(scores)).log()
        shift = shift + gap
        if float(gap.abs().max()) < TOLERANCE:
            break
    return torch.log_softmax(scores + shift, 1)


def _centred(scores: Tensor) -> Tensor:
    """Scores (N, C) minus each text's mean, then minus each class's mean."""
    per_text = scores - scores.mean(1, keepdim=True)
    return per_text - per_text.mean(0)


def _scale(scores: Tensor) -> Tensor:
    """Root mean square of the centred scores: ()."""
    return _centred(scores).pow(2).mean().sqrt()


def standard(scores: Tensor) -> Tensor:
    """Class scores (N, C), centred, with mean square 1; zeros if all texts have the same scores."""
    return _centred(scores) / _scale(scores).clamp_min(1e-12)
