"""A model's head, applied to hidden states that were computed elsewhere."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


class Head:
    """Hidden states (..., d) -> logits over the vocabulary (..., V), float32.

    The model's own ``forward`` runs, with a stand-in for its body that hands out the given states. So the head
    may be whatever the family has: a plain matrix, a masked model's transform, capped or scaled logits.
    """

    def __init__(self, model: Any) -> None:
        self._body = _Body()
        self._model = copy.copy(model)  # shares the head's weights
        self._model._modules = {**model._modules, model.base_model_prefix: self._body}

    def __call__(self, hidden: Tensor) -> Tensor:
        self._body.hidden = hidden.reshape(1, -1, hidden.shape[-1])
        try:
            logits = self._model(inputs_embeds=self._body.hidden).logits
        finally:
            self._body.hidden = None
        return logits.float().reshape(*hidden.shape[:-1], -1)  # type: ignore[no-any-return]


class _Body(nn.Module):
    """Stands where a model's body was."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    @property
    def decoder(self) -> _Body:
        """Some families reach into their body for its decoder."""
        return self

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)
