"""A frozen Hugging Face language model: its properties, and one pass through it.

No architecture is named here: differences between families come from the configuration or a signature.
Shapes: B rows, T tokens, l prompt vectors, L = l + T positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, DynamicCache

from post_shared.engine.gated_mlp import recompute_activations
from post_shared.engine.kv_cache import can_keep_prefix
from post_shared.engine.lm_head import Head
from post_shared.engine.offload import device_of, devices_of, reload_in_backward, weights_of
from post_shared.errors import PromptMismatch

Kind = Literal["causal", "masked"]


class Backbone:
    """A frozen language model in evaluation mode, with its tokenizer.

    Gradients flow through it to a prompt. Its own weights get none; distillation enables them for its student.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.kind: Kind = kind_of(self.model.config)
        reload_in_backward(self.model)
        self._head = Head(self.model)
        recompute_activations(self.model)

    # --- properties -----------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.model.config

    @cached_property
    def hidden_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    @cached_property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def architecture(self) -> str:
        return str(self.config.model_type)

    @property
    def device(self) -> torch.device:
        """The device of the embeddings, where inputs and outputs are, wherever the layers are."""
        return device_of(self.model.get_input_embeddings())

    @cached_property
    def devices(self) -> set[torch.device]:
        """The devices of the layers; more than one if the model is spread over GPUs."""
        return devices_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype  # type: ignore[no-any-return]

    @cached_property
    def parameters(self) -> int:
        """Number of distinct weights (tied ones counted once)."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def nbytes(self) -> int:
        """Memory of the weights, in bytes."""
        return sum(p.nbytes for p in self.model.parameters())

    def weights(self) -> Iterator[Tensor]:
        """Every distinct weight, one by one, wherever it is stored."""
        return weights_of(self.model)

    @cached_property
    def max_length(self) -> int:
        """Positions of the model, prompt included; a very large number if there is no limit."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if not isinstance(limit, int) or limit <= 0:
            return 1_000_000
        table = getattr(getattr(self.body, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)  # such tables number their positions from padding_idx + 1
        return limit if padding is None else limit - padding - 1

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        return getattr(self.model, self.model.base_model_prefix)  # type: ignore[no-any-return]

    @cached_property
    def keeps_prefix(self) -> bool:
        """Whether a prompt can be run once and kept as keys and values: not if it sees the text (masked models)."""
        return self.kind == "causal" and can_keep_prefix(self.body, self.config)

    # --- forward --------------------------------------------------------------------------------------

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> input embeddings (B, T, d), in the model's data type."""
        return self.model.get_input_embeddings()(token_ids.to(self.device))  # type: ignore[no-any-return]

    def hidden(self, token_ids: Tensor, attention_mask: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Last hidden states (B, l + T, d) of right-padded rows, with the prompt prepended to each row.

        ``prompt`` is (l, d), one for all rows, or (B, l, d), one per row.
        A causal model needs no mask here: no real position can see the padding on its right.
        """
        inputs = self.embed(token_ids)
        if prompt is not None:
            inputs = self._prepend(prompt, inputs)
            if attention_mask is not None:
                attention_mask = nn.functional.pad(attention_mask, (prompt.shape[-2], 0), value=1)
        if self.kind == "causal" or attention_mask is None or bool(attention_mask.all()):
            attention_mask = None
        else:
            attention_mask = attention_mask.to(self.device)
        return self.last_hidden(inputs_embeds=inputs, attention_mask=attention_mask)

    def head(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Hidden states (..., d) -> logits over the vocabulary (..., V), or at ``tokens`` (..., K), float32."""
        return self._head(hidden, tokens)

    def cache_of(self, prompt: Tensor) -> DynamicCache:
        """Keys and values of ``prompt``, (l, d) or (K, l, d), in every layer, as a cache of one row or K rows."""
        self.check_width(prompt)
        inputs = prompt.reshape(-1, *prompt.shape[-2:]).to(self.device, self.dtype)
        cache = DynamicCache()  # without the configuration, so that a sliding layer keeps the whole prompt and masks it
        self.run_body(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        return cache

    def last_hidden(self, **inputs: Any) -> Tensor:
        """The body's last hidden states, moved to the device of its inputs."""
        return self.run_body(**inputs).last_hidden_state.to(self.device)  # type: ignore[no-any-return]

    def run_body(self, **inputs: Any) -> Any:
        """The body's forward, without the inputs that its family doesn't accept."""
        inputs.setdefault("use_cache", False)
        known = inspect.signature(self.body.forward).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
        return self.body(**{name: value for name, value in inputs.items() if takes_all or name in known})

    def check_width(self, prompt: Tensor) -> None:
        """Raise :class:`PromptMismatch` if the prompt's width isn't the model's hidden size."""
        if prompt.shape[-1] != self.hidden_size:
            raise PromptMismatch(
                f"the prompt's vectors have width {prompt.shape[-1]}, the model's hidden size is {self.hidden_size}"
            )

    def _prepend(self, prompt: Tensor, inputs: Tensor) -> Tensor:
        self.check_width(prompt)
        rows = prompt if prompt.dim() == 3 else prompt.expand(inputs.shape[0], -1, -1)  # (l, d) -> (B, l, d)
        return torch.cat([rows.to(inputs.device, inputs.dtype), inputs], dim=1)


def kind_of(config: Any) -> Kind:
    """Masked if the family has a masked-language-model class and isn't configured as a decoder."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return "masked" if masked else "causal"
