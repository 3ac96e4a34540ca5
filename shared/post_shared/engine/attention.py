"""Torch's attention as transformers calls it, for packed rows, and without copies of heads that queries share.

Of fewer key/value heads than queries (grouped-query attention) transformers repeats each for all queries that share it
where there is a mask, since some GPU kernels want that. The CPU's kernel doesn't: results are the same, and what a step
keeps for the way back behind a shared prompt is a fifth less.

Numbers of 16 bits the CPU's kernel takes forward quickly, and back three to ten times as slowly as those of 32. They
go back in float32, which is nearer to the truth besides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from post_shared.engine.packing import packed_now

NAME = "sdpa"
"""Of torch's own attention among those of transformers."""
PLAIN = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}
"""What a call may say besides, without any more being done than is done here: the mask holds the rest."""


NARROW = (torch.bfloat16, torch.float16)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def install() -> None:
    """Let models that use torch's attention take packed rows, and share their key/value heads on the CPU."""
    ALL_ATTENTION_FUNCTIONS[NAME] = attention


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **said: Any
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling + mask) v: query (B, h, T, e), key and value (B, h / g, L, e) -> (B, T, h, e).

    In a packed row every text by itself, and the mask is the packing's own.
    """
    packing = packed_now()
    if packing is not None:
        apart = lambda q, k, v, mask: _attention(module, q, k, v, mask, **said)[0]  # noqa: E731
        return packing.attend(apart, query, key, value), None
    return _attention(module, query, key, value, attention_mask, **said)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **said: Any
) -> tuple[Tensor, None]:
    if _says_no_more(said) and not said.get("dropout") and _goes_back_slowly(query, key, value):
        return _Widened.apply(query, key, value, partial(_mixed, module, attention_mask, said)), None  # type: ignore[no-untyped-call]
    return _mixed(module, attention_mask, said, query, key, value), None


def _mixed(
    module: nn.Module, mask: Tensor | None, said: dict[str, Any], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    if isinstance(mask, CausalBias):
        if _says_no_more(said):
            return _behind_a_prompt(query, key, value, mask, said.get("scaling"))
        mask = mask._materialize(query.device)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)  # the way back takes the inputs in another type
    if not _shares(query, key, value, mask, said):
        made: Tensor = sdpa_attention_forward(module, query, key, value, mask, **said)[0]
        return made
    mixed = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=said.get("dropout", 0.0),
        scale=said.get("scaling"),
        enable_gqa=True,
    )
    return mixed.transpose(1, 2).contiguous()


def _behind_a_prompt(query: Tensor, key: Tensor, value: Tensor, seen: CausalBias, scaling: float | None) -> Tensor:
    """Of what is seen the GPU's kernels need the name alone; those for 16 bits share key/value heads, too."""
    shares = query.shape[1] > key.shape[1]
    if shares and query.dtype not in NARROW:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
        shares = False
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=shares
    )
    return mixed.transpose(1, 2).contiguous()


class _Widened(torch.autograd.Function):
    """Attention of 16-bit numbers that goes back in float32, from what it took."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.attend = attend
        return attend(query, key, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            leaves = [each.detach().float().requires_grad_() for each in ctx.saved_tensors]
            found = torch.autograd.grad(ctx.attend(*leaves), leaves, gradient.float())
        return *(each.to(saved.dtype) for each, saved in zip(found, ctx.saved_tensors, strict=True)), None


def _goes_back_slowly(*inputs: Tensor) -> bool:
    """Whether 16-bit numbers on a CPU, or those that autocast will make of others, want gradients."""
    if not torch.is_grad_enabled() or not any(each.requires_grad for each in inputs):
        return False
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") in NARROW
    return all(each.device.type == "cpu" and (cast or each.dtype in NARROW) for each in inputs)


def _says_no_more(said: dict[str, Any]) -> bool:
    """Whether all that a call says besides is in the mask."""
    return all(name in PLAIN or value is None or value is False for name, value in said.items())


def _shares(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, said: dict[str, Any]) -> bool:
    """Whether heads are shared, on a CPU, with a mask, over several positions, and nothing else is asked for."""
    return (
        mask is not None
        and key.device.type == "cpu"
        and query.shape[1] > key.shape[1]
        and query.shape[2] > 1
        and key.shape[-1] == value.shape[-1]
        and _says_no_more(said)
    )
