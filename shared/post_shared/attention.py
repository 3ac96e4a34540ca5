"""Torch's attention as transformers calls it, for packed rows, and without copies of heads that queries share.

Of fewer key/value heads than queries (grouped-query attention) transformers repeats each for all queries that share it
where there is a mask, since some GPU kernels want that. The CPU's kernel doesn't: results are the same, and what a step
keeps for the way back behind a shared prompt is a fifth less.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from post_shared.packing import packed_now

NAME = "sdpa"
"""Of torch's own attention among those of transformers."""
PLAIN = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}
"""What a call may say besides, without any more being done than is done here: the mask holds the rest."""


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
    if not _shares(query, key, value, attention_mask, said):
        made: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **said)
        return made
    mixed = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=said.get("dropout", 0.0),
        scale=said.get("scaling"),
        enable_gqa=True,
    )
    return mixed.transpose(1, 2).contiguous(), None


def _shares(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, said: dict[str, Any]) -> bool:
    """Whether heads are shared, on a CPU, with a mask, over several positions, and nothing else is asked for."""
    return (
        mask is not None
        and key.device.type == "cpu"
        and query.shape[1] > key.shape[1]
        and query.shape[2] > 1
        and key.shape[-1] == value.shape[-1]
        and all(name in PLAIN or value is None or value is False for name, value in said.items())
    )
