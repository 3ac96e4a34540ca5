"""The two losses of Eq. 1 over the vocabulary, in one go and a few positions at a time.

Written one operation after the other, each reads and writes all positions times the vocabulary, which no cache holds:
on a CPU that took as long as all matrix products of a step. Here a few positions go through all operations while they
are in the cache, and nothing but the logits is kept for the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from post_shared.data.batches import OPEN

CHUNK = {"cpu": 2**21, "cuda": 2**29}
"""Bytes of the logits that are taken at a time: what a core's cache holds, or what fills a GPU."""


def vocabulary_losses(teacher: Tensor, student: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(L_ce, L_lm) of each position, of logits (P, V), (P, V) and tokens (P,): (P,), (P,).

    Values and gradients (the student's alone) of :func:`post_shared.method.losses.softened_cross_entropy` and
    :func:`post_shared.method.losses.language_model_loss`.
    """
    found: tuple[Tensor, Tensor] = _Losses.apply(student, teacher, tokens, temperature)  # type: ignore[no-untyped-call]
    return found


class _Losses(torch.autograd.Function):
    """With q, p and s the student's softened, the teacher's softened and the student's own distribution,
    dL_ce/dlogits = τ (q - p) and dL_lm/dlogits = s - onehot(token)."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(student, teacher, tokens)
        ctx.temperature = temperature
        ce, lm = (torch.empty(len(tokens), device=student.device) for _ in range(2))
        for some in _chunks(student):
            ours, q, s = _softened(student[some], temperature)
            theirs, p, _ = _softened(teacher[some], temperature)
            log_q, log_p = q.sum(-1, keepdim=True).log_(), p.sum(-1, keepdim=True)
            p.div_(log_p)
            apart = theirs.sub_(ours).div_(temperature).add_(log_q - log_p.log_())
            ce[some] = p.mul_(apart).sum(-1) * temperature**2
            at = tokens[some].clamp(min=0)[:, None]
            lm[some] = s.sum(-1).log_() - ours.gather(1, at)[:, 0]
        return ce, lm.masked_fill_(tokens == OPEN, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        student, teacher, tokens = ctx.saved_tensors
        to_ce, to_lm = gradients
        to_ce, to_lm = to_ce[:, None] * ctx.temperature, to_lm.masked_fill(tokens == OPEN, 0.0)[:, None]
        found = torch.empty_like(student)
        for some in _chunks(student):
            _, q, s = _softened(student[some], ctx.temperature)
            _, p, _ = _softened(teacher[some], ctx.temperature)
            q.mul_(to_ce[some] / q.sum(-1, keepdim=True))
            q.sub_(p.mul_(to_ce[some] / p.sum(-1, keepdim=True)))
            q.add_(s.mul_(to_lm[some] / s.sum(-1, keepdim=True)))
            found[some] = q.scatter_add_(1, tokens[some].clamp(min=0)[:, None], -to_lm[some])
        return found, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    positions, width = logits.shape
    size = max(1, CHUNK["cuda" if logits.is_cuda else "cpu"] // (4 * width))
    return (slice(at, at + size) for at in range(0, positions, size))


def _softened(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits less their largest, exp of these over τ, and exp of these themselves."""
    below = logits.float() - logits.amax(-1, keepdim=True)
    soft = (below / temperature).exp_()
    return below, soft, soft.pow(temperature)
