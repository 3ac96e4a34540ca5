"""What the target model is to say about a public text: its own opinion and the prompted student's, put together.

The student has learnt the task from private data but reads badly; the target reads well but doesn't know the task.
Their errors differ, so that the two together rank texts better than either (``docs/explanation-method.md`` has the
figures). Each leans towards some classes on text of another domain. The target's lean carries nothing about the task
and is taken off; of the student's, which may also be what the texts are about, half is kept (:func:`believed_shares`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from post_shared.errors import InvalidInput

ROUNDS = 200
TOLERANCE = 1e-4


def ensemble(student: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Log-probabilities (N, C) from class scores (N, C) of the prompted student and of the target without a prompt.

    Both are centred and brought to the same spread, added with weights 1 and α (α̃ of Eq. 6: how far the target is to
    be trusted), and spread as the student's: no more certain than who has learnt the task.

    Raises:
        InvalidInput: a score is no finite number.
    """
    if not (torch.isfinite(student).all() and torch.isfinite(target).all()):
        raise InvalidInput("answers to public texts are no numbers: a prompt of far too large ones, or a broken model")
    known, own = standard(student), standard(target)
    both = known + alpha * own
    return balanced(standard(both) * _spread(student), believed_shares(student))


def believed_shares(student: Tensor) -> Tensor:
    """Of each class among the public texts (C,): halfway, as a geometric mean, from even to what the student says.

    Public texts may well be of one class more than of others: of tweets, more are about sports than about business.
    The student, who knows the classes, sees that, but leans on text that it wasn't tuned for.
    """
    said = torch.log_softmax(student, 1).logsumexp(0)
    return torch.softmax(said / 2, 0)


def balanced(scores: Tensor, shares: Tensor | None = None) -> Tensor:
    """Log-probabilities (N, C) of scores (N, C) plus one constant per class that gives the classes these shares (C,).

    They are equal if none are given. The constants are found by fixed-point steps, which raise the likelihood of a
    convex problem and so converge.
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
    """Without what all classes share in a text, and without what all texts share in a class."""
    within = scores - scores.mean(1, keepdim=True)
    return within - within.mean(0)


def _spread(scores: Tensor) -> Tensor:
    return _centred(scores).pow(2).mean().sqrt()


def standard(scores: Tensor) -> Tensor:
    """Class scores (N, C), centred, with mean square 1; zeros if all texts are scored alike."""
    return _centred(scores) / _spread(scores).clamp_min(1e-12)
