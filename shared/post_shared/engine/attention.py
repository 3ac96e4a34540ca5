"""Torch's attention as transformers calls it, for packed rows, and without copies of shared key/value heads.

In grouped-query attention with a mask, transformers repeats each key/value head for all queries that share it, because
some GPU kernels need that. The CPU kernel doesn't: results are the same, and a step behind a shared prompt keeps a
fifth less for the backward pass.

In 16 bits the CPU kernel is fast forward and 3–10 times slower backward. There the backward pass runs in float32, which
is also more accurate.
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
"""The name that transformers gives to torch's own attention."""
COVERED_OPTIONS = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}
"""Options of a call that need nothing beyond what is done here: the mask covers the rest."""


HALF_PRECISION = (torch.bfloat16, torch.float16)
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def install() -> None:
    """Make models that use torch's attention accept packed rows, and share their key/value heads on the CPU."""
    ALL_ATTENTION_FUNCTIONS[NAME] = attention


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling + mask) v: query (B, h, T, e), key and value (B, h / g, L, e) -> (B, T, h, e).

    In a packed row, each text is computed separately under the packing's own mask.
    """
    packing = packed_now()
    if packing is not None:
        per_group = lambda q, k, v, mask: _attention(module, q, k, v, mask, **options)[0]  # noqa: E731
        return packing.attend(per_group, query, key, value), None
    return _attention(module, query, key, value, attention_mask, **options)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if _mask_covers(options) and not options.get("dropout") and _slow_backward(query, key, value):
        return _Float32Backward.apply(query, key, value, partial(_mixed, module, attention_mask, options)), None  # type: ignore[no-untyped-call]
    return _mixed(module, attention_mask, options, query, key, value), None


def _mixed(
    module: nn.Module, mask: Tensor | None, options: dict[str, Any], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    if isinstance(mask, CausalBias):
        if _mask_covers(options):
            return _behind_prompt(query, key, value, mask, options.get("scaling"))
        mask = mask._materialize(query.device)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)  # the backward pass runs in another type
    if not _shares_heads(query, key, value, mask, options):
        output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return output
    mixed = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
        enable_gqa=True,
    )
    return mixed.transpose(1, 2).contiguous()


def _behind_prompt(query: Tensor, key: Tensor, value: Tensor, mask: CausalBias, scaling: float | None) -> Tensor:
    """GPU kernels only need the kind of the mask, not its values; the 16-bit ones also share key/value heads."""
    shares = query.shape[1] > key.shape[1]
    if shares and query.dtype not in HALF_PRECISION:
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
        shares = False
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=shares
    )
    return mixed.transpose(1, 2).contiguous()


class _Float32Backward(torch.autograd.Function):
    """16-bit attention whose backward pass runs in float32, from the saved inputs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attend: AttentionFn) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.attend = attend
        return attend(query, key, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            leaves = [saved.detach().float().requires_grad_() for saved in ctx.saved_tensors]
            wide = torch.autograd.grad(ctx.attend(*leaves), leaves, gradient.float())
        return *(grad.to(saved.dtype) for grad, saved in zip(wide, ctx.saved_tensors, strict=True)), None


def _slow_backward(*inputs: Tensor) -> bool:
    """Whether these inputs need gradients and are 16-bit on a CPU, or will be cast to 16 bits by autocast."""
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return False
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") in HALF_PRECISION
    return all(tensor.device.type == "cpu" and (cast or tensor.dtype in HALF_PRECISION) for tensor in inputs)


def _mask_covers(options: dict[str, Any]) -> bool:
    """Whether the mask already covers all options of a call."""
    return all(name in COVERED_OPTIONS or value is None or value is False for name, value in options.items())


def _shares_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether this is plain grouped-query attention on a CPU, with a mask and over several positions."""
    return (
        mask is not None
        and key.device.type == "cpu"
        and query.shape[1] > key.shape[1]
        and query.shape[2] > 1
        and key.shape[-1] == value.shape[-1]
        and _mask_covers(options)
    )
