"""The two vocabulary losses of Eq. 1 in one fused pass, a chunk of positions at a time.

Computed one operation after the other, each operation reads and writes positions × vocabulary values, which no cache
holds: on a CPU that took as long as all matrix products of a step. Here each chunk goes through all operations while
it is in the cache, and only the logits are saved for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from post_shared.data.batches import IGNORE_INDEX

CHUNK = {"cpu": 2**21, "cuda": 2**29}
"""Bytes of logits in a chunk: what fits a core's cache, or what fills a GPU."""


def vocabulary_losses(teacher: Tensor, student: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(L_ce, L_lm) at each position, from logits (P, V), (P, V) and tokens (P,): (P,), (P,).

    Same values, and gradients for the student, as :func:`post_shared.method.losses.softened_cross_entropy` and
    :func:`post_shared.method.losses.language_model_loss`.
    """
    losses: tuple[Tensor, Tensor] = _Losses.apply(student, teacher, tokens, temperature)  # type: ignore[no-untyped-call]
    return losses


class _Losses(torch.autograd.Function):
    """With q and p the student's and the teacher's softened distributions and s the student's own,
    dL_ce/dlogits = τ (q - p) and dL_lm/dlogits = s - onehot(token)."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(student, teacher, tokens)
        ctx.temperature = temperature
        ce, lm = (torch.empty(len(tokens), device=student.device) for _ in range(2))
        for chunk in _chunks(student):
            logits_q, q, s = _exponentials(student[chunk], temperature)
            logits_p, p, _ = _exponentials(teacher[chunk], temperature)
            log_q, log_p = q.sum(-1, keepdim=True).log_(), p.sum(-1, keepdim=True)
            p.div_(log_p)
            log_ratio = logits_p.sub_(logits_q).div_(temperature).add_(log_q - log_p.log_())
            ce[chunk] = p.mul_(log_ratio).sum(-1) * temperature**2
            token = tokens[chunk].clamp(min=0)[:, None]
            lm[chunk] = s.sum(-1).log_() - logits_q.gather(1, token)[:, 0]
        return ce, lm.masked_fill_(tokens == IGNORE_INDEX, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        student, teacher, tokens = ctx.saved_tensors
        grad_ce, grad_lm = gradients
        grad_ce, grad_lm = grad_ce[:, None] * ctx.temperature, grad_lm.masked_fill(tokens == IGNORE_INDEX, 0.0)[:, None]
        gradient = torch.empty_like(student)
        for chunk in _chunks(student):
            _, q, s = _exponentials(student[chunk], ctx.temperature)
            _, p, _ = _exponentials(teacher[chunk], ctx.temperature)
            q.mul_(grad_ce[chunk] / q.sum(-1, keepdim=True))
            q.sub_(p.mul_(grad_ce[chunk] / p.sum(-1, keepdim=True)))
            q.add_(s.mul_(grad_lm[chunk] / s.sum(-1, keepdim=True)))
            gradient[chunk] = q.scatter_add_(1, tokens[chunk].clamp(min=0)[:, None], -grad_lm[chunk])
        return gradient, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    positions, width = logits.shape
    size = max(1, CHUNK["cuda" if logits.is_cuda else "cpu"] // (4 * width))
    return (slice(start, start + size) for start in range(0, positions, size))


def _exponentials(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits minus their maximum; exp of these over τ; exp of these."""
    shifted = logits.float() - logits.amax(-1, keepdim=True)
    soft = (shifted / temperature).exp_()
    return shifted, soft, soft.pow(temperature)
