"""Gated feed-forward blocks that keep less for the backward pass.

``down(act(gate(x)) * up(x))`` keeps three wide tensors per position: the gate, its activation, and the factor that the
activation is multiplied by. The activation is cheap to recompute, so two are enough: a fifth less of everything that a
pass keeps. Values and gradients are bit-for-bit the same.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from post_shared.engine.offload import device_of

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""The members of such a block, in any model family."""


def recompute_activations(model: nn.Module) -> None:
    """Make every gated block of ``model`` recompute its activation in the backward pass."""
    plain: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        if all(callable(getattr(module, name, None)) for name in PARTS):
            kind = type(module)
            plain[kind] = plain[kind] if kind in plain else _is_plain(module)
            if plain[kind]:
                own = "_old_forward" if "_old_forward" in vars(module) else "forward"  # accelerate's hooks call that
                setattr(module, own, MethodType(_forward, module))


def _is_plain(module: Any) -> bool:
    """Whether the block computes what :func:`_forward` computes, tested on a small sample."""
    weight: Any = getattr(module.gate_proj, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    sample = torch.linspace(-1.0, 1.0, weight.shape[1], device=device_of(module.gate_proj)).to(weight.dtype)[None, None]
    with torch.no_grad():
        try:
            return torch.equal(module(sample), _forward(module, sample))
        except (RuntimeError, TypeError, ValueError):
            return False


def _forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x), self.act_fn))  # type: ignore[no-any-return,no-untyped-call]


class _Gate(torch.autograd.Function):
    """``activation(gate) * up``, saving only ``gate`` and ``up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        to_gate = torch.autograd.grad(activated, leaf, gradient * up)[0] if ctx.needs_input_grad[0] else None
        return to_gate, gradient * activated.detach() if ctx.needs_input_grad[1] else None, None
