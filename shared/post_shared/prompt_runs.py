"""One run of a prompt for many rows, each of which goes back through it by itself.

A causal model's prompt sees nothing of the text behind it, so its keys and values K, V are the same for all rows, and
so is all that the way back through them needs. Where every row i wants a gradient of its own, its loss L_i goes back to
K and V, and many rows go on from there to the prompt p together: ``g_i = (∂(K, V) / ∂p)ᵀ ∂L_i / ∂(K, V)``. That is the
gradient of a row with a run of its own, without that run.

Shapes: B rows, l prompt vectors, d hidden width, h key/value heads, e their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache

from post_shared.prefixes import RowsLayer

if TYPE_CHECKING:
    from post_shared.language_model import LanguageModel

POSITIONS = 1024
"""How many a pass back through the prompts of rows has at most, or one row's."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What B rows see of a prompt, each with its own place for a gradient."""

    prompts: Tensor
    """(B, l, d), the same B times: what a loss takes, and what it may depend on besides the model's answers."""
    seen: tuple[Tensor, ...]
    """Keys and values of each layer in turn, (B, h, l, e) each."""

    def cache(self) -> Cache:
        """For the model's forward, which puts the texts' own keys and values behind them."""
        return Cache(layers=[RowsLayer(*pair) for pair in zip(self.seen[::2], self.seen[1::2], strict=True)])

    def gradients(self, losses: Tensor) -> tuple[Tensor, ...]:
        """Of losses (B,): (B, l, d) to ``prompts``, then those to ``seen``; row i's is that of the i-th loss."""
        found = torch.autograd.grad(losses.sum(), (self.prompts, *self.seen), materialize_grads=True)
        return tuple(each.contiguous() for each in found)  # without the texts' own that they are cut from


class PromptRun:
    """The keys and values of ``prompt`` (l, d), and the way back from them. Good until the prompt moves."""

    def __init__(self, model: LanguageModel, prompt: Tensor) -> None:
        self.prompt = prompt.detach().clone().requires_grad_()
        with (
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # of the kernels the one that goes back for many at once
            layers = model.cache_of(self.prompt).layers
        self.kept = tuple(each for layer in layers for each in (layer.keys, layer.values))  # (1, h, l, e) each

    @property
    def together(self) -> int:
        """How many rows' ways back fill a pass."""
        return max(1, POSITIONS // len(self.prompt))

    @contextmanager
    def rows(self, count: int) -> Iterator[Rows]:
        """What so many rows see. While open, a model that is given these very prompts puts rows behind this run."""
        own = [
            each.detach().expand(count, *each.shape[1:]).requires_grad_() for each in (self.prompt[None], *self.kept)
        ]
        rows = Rows(own[0], tuple(own[1:]))
        token = _open.set(rows)
        try:
            yield rows
        finally:
            _open.reset(token)

    def back(self, gradients: Sequence[Tensor]) -> Tensor:
        """From :meth:`Rows.gradients` of B rows to those at the prompt, (B, l, d)."""
        some = zip(*(torch.split(each, self.together) for each in gradients), strict=True)
        return torch.cat([self._back(*each) for each in some])

    def _back(self, own: Tensor, *seen: Tensor) -> Tensor:
        (through,) = torch.autograd.grad(
            self.kept, self.prompt, [each[:, None] for each in seen], retain_graph=True, is_grads_batched=True
        )
        return own + through


_open: ContextVar[Rows | None] = ContextVar("rows", default=None)


def rows_of(prompts: Tensor) -> Rows | None:
    """The open :class:`Rows` whose ``prompts`` these are; None: they are to be run."""
    rows = _open.get()
    return rows if rows is not None and rows.prompts is prompts else None


def can_run_once(model: LanguageModel, length: int, longest: int | None = None) -> bool:
    """Whether rows behind one run of a prompt have the gradients that they have behind runs of their own.

    Tried with ``length`` vectors and texts of ``longest`` tokens: positions may be scaled by how many there are.
    """
    if not model.keeps_prefix:
        return False
    tokens = max(1, min(longest or 4, model.max_length - length))
    prompt = torch.linspace(-1, 1, length * model.hidden_size, device=model.device).reshape(length, -1)
    token_ids = (1 + torch.arange(2 * tokens, device=model.device) % 3).reshape(2, tokens)

    def loss(hidden: Tensor) -> Tensor:
        return hidden[:, -1].float().pow(3).sum(-1)  # (B, T, d) -> (B,)

    leaf = prompt.repeat(2, 1, 1).requires_grad_()
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(loss(model.hidden(token_ids, prompt=leaf)).sum(), leaf)
        try:
            run = PromptRun(model, prompt)
            with run.rows(2) as rows:
                hidden = model.last_hidden(
                    inputs_embeds=model.embed(token_ids), past_key_values=rows.cache(), use_cache=True
                )
            found = run.back(rows.gradients(loss(hidden)))
        except (RuntimeError, TypeError, ValueError):
            return False
    return bool((found - expected).norm() <= torch.finfo(model.dtype).eps ** 0.5 * expected.norm())
