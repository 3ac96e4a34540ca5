"""One run of a prompt for many rows, each of which goes back through it by itself.

In a causal model a prompt sees nothing of the text behind it. So its keys and values K, V are the same for all rows,
and so is all that the backward pass through them needs. If every row i wants a gradient of its own, its loss L_i is
differentiated back to K and V, and many rows continue from there to the prompt p together:
``g_i = (∂(K, V) / ∂p)ᵀ ∂L_i / ∂(K, V)``. That is the gradient of a row with a run of its own, without that run.

Shapes: B rows, l prompt vectors, d hidden size, h key/value heads, e their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache

from post_shared.engine.backbone import Backbone
from post_shared.engine.kv_cache import RowsLayer

POSITIONS = 1024
"""The most positions in a backward pass through the prompts of rows, unless one row has more."""


@dataclass(frozen=True, eq=False)
class PrefixRows:
    """What B rows see of a prompt, each with a leaf of its own that collects its gradient."""

    prompts: Tensor
    """(B, l, d), the same B times: what a loss may depend on besides the model's answers."""
    seen: tuple[Tensor, ...]
    """Keys and values of each layer in turn, (B, h, l, e) each."""

    def cache(self) -> Cache:
        """For the model's forward, which puts the keys and values of the texts behind them."""
        return Cache(layers=[RowsLayer(*pair) for pair in zip(self.seen[::2], self.seen[1::2], strict=True)])

    def gradients(self, losses: Tensor) -> tuple[Tensor, ...]:
        """Of losses (B,): (B, l, d) for ``prompts``, then those for ``seen``. Row i's is that of the i-th loss."""
        found = torch.autograd.grad(losses.sum(), (self.prompts, *self.seen), materialize_grads=True)
        return tuple(each.contiguous() for each in found)  # without the texts' part that they are cut from


class SharedPrefix:
    """The keys and values of ``prompt`` (l, d), and the backward pass from them. Valid until the prompt moves."""

    def __init__(self, model: Backbone, prompt: Tensor) -> None:
        self.prompt = prompt.detach().clone().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only kernel that can go back for many at once
            layers = model.cache_of(self.prompt).layers
        self.kept = tuple(each for layer in layers for each in (layer.keys, layer.values))  # (1, h, l, e) each

    @property
    def rows_per_pass(self) -> int:
        """How many rows fill one backward pass."""
        return max(1, POSITIONS // len(self.prompt))

    def rows(self, count: int) -> PrefixRows:
        """What ``count`` rows see of the prompt."""
        own = [
            each.detach().expand(count, *each.shape[1:]).requires_grad_() for each in (self.prompt[None], *self.kept)
        ]
        return PrefixRows(own[0], tuple(own[1:]))

    def back(self, gradients: Sequence[Tensor]) -> Tensor:
        """From :meth:`PrefixRows.gradients` of B rows to their gradients at the prompt, (B, l, d)."""
        some = zip(*(torch.split(each, self.rows_per_pass) for each in gradients), strict=True)
        return torch.cat([self._back(*each) for each in some])

    def _back(self, own: Tensor, *seen: Tensor) -> Tensor:
        (through,) = torch.autograd.grad(
            self.kept, self.prompt, [each[:, None] for each in seen], retain_graph=True, is_grads_batched=True
        )
        return own + through


def can_share_prefix(model: Backbone, length: int, longest: int | None = None) -> bool:
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
            shared = SharedPrefix(model, prompt)
            rows = shared.rows(2)
            hidden = model.last_hidden(
                inputs_embeds=model.embed(token_ids), past_key_values=rows.cache(), use_cache=True
            )
            found = shared.back(rows.gradients(loss(hidden)))
        except (RuntimeError, TypeError, ValueError):
            return False
    return bool((found - expected).norm() <= torch.finfo(model.dtype).eps ** 0.5 * expected.norm())
