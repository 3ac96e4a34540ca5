"""A model's head, applied to hidden states that were computed elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from post_shared.engine.offload import device_of, weight_of


class Head:
    """Hidden states (..., d) -> logits over the vocabulary (..., V) or at some tokens of it (..., K), float32.

    The model's own ``forward`` runs, with a stand-in for its body that hands out the given states. So the head
    may be whatever the family has: a plain matrix, a masked model's transform, capped or scaled logits.
    """

    def __init__(self, model: Any) -> None:
        self._body = _Body()
        self._model = _with(model, [model.base_model_prefix], self._body)  # shares the head's weights
        last = model.get_output_embeddings()
        linear = isinstance(last, nn.Linear)
        self._last = next((name for name, module in model.named_modules() if module is last), "") if linear else ""
        """Where the matrix over the vocabulary stands, if it is a plain one."""
        self._matrix = last or model.get_input_embeddings()

    @property
    def _place(self) -> torch.device:
        """Where the head computes now: a model may be moved."""
        return device_of(self._matrix)

    def __call__(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        model = self._model if tokens is None or not self._last else self._of(tokens)
        self._body.hidden = hidden.reshape(1, -1, hidden.shape[-1]).to(self._place)
        try:
            logits = model(inputs_embeds=self._body.hidden).logits
        finally:
            self._body.hidden = None
        if tokens is not None and not self._last:
            logits = logits[..., tokens.to(logits.device)]
        return logits.float().reshape(*hidden.shape[:-1], -1).to(hidden.device)  # type: ignore[no-any-return]

    def _of(self, tokens: Tensor) -> Any:
        """The head with the rows of ``tokens`` alone: the rest of a large matrix isn't even read."""
        whole = self._model.get_submodule(self._last)
        bias = None if whole.bias is None else self._rows(whole, "bias", tokens)
        narrow = _Rows(self._rows(whole, "weight", tokens), bias)
        return _with(self._model, self._last.split("."), narrow)

    def _rows(self, whole: nn.Module, name: str, tokens: Tensor) -> Tensor:
        weight = weight_of(whole, name)
        return weight[tokens.to(weight.device)].to(self._place)


def _with(module: Any, path: list[str], replacement: nn.Module) -> Any:
    """``module`` with ``replacement`` at ``path``; what isn't on the way is shared, and nothing is changed."""
    inner = replacement if len(path) == 1 else _with(module._modules[path[0]], path[1:], replacement)
    other = copy.copy(module)
    vars(other).pop("forward", None)  # one that was put over the family's own knows the original alone
    other._modules = {**module._modules, path[0]: inner}
    return other


class _Rows(nn.Module):
    """Some rows of a matrix, with their biases."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


class _Body(nn.Module):
    """Stands where a model's body was."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    @property
    def decoder(self) -> _Body:
        """Some families reach into their body for its decoder."""
        return self

    def forward(self, *_: object, **__: object) -> _Output:
        return _Output(last_hidden_state=self.hidden)


class _Output(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]
    """What a body hands over; of all that only some families ask for (such as a router's logits), nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
