"""A model's language-model head, applied to given hidden states."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from post_shared.engine.offload import device_of, weight_of


class Head:
    """Hidden states (..., d) -> logits over the vocabulary (..., V) or at some of its tokens (..., K), float32.

    It runs the model's own ``forward`` with a stub body that returns the given states, so it works for any kind of
    head: a plain matrix, a masked model's transform, capped or scaled logits.
    """

    def __init__(self, model: Any) -> None:
        self._body = _StubBody()
        self._model = _replaced(model, [model.base_model_prefix], self._body)  # shares the head's weights
        last = model.get_output_embeddings()
        linear = isinstance(last, nn.Linear)
        self._last = next((name for name, module in model.named_modules() if module is last), "") if linear else ""
        """Name of the vocabulary matrix's module, or empty if the head isn't a plain matrix."""
        self._matrix = last or model.get_input_embeddings()

    @property
    def _device(self) -> torch.device:
        """The head's current device: a model may be moved."""
        return device_of(self._matrix)

    def __call__(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        model = self._model if tokens is None or not self._last else self._narrowed(tokens)
        self._body.hidden = hidden.reshape(1, -1, hidden.shape[-1]).to(self._device)
        try:
            logits = model(inputs_embeds=self._body.hidden).logits
        finally:
            self._body.hidden = None
        if tokens is not None and not self._last:
            logits = logits[..., tokens.to(logits.device)]
        return logits.float().reshape(*hidden.shape[:-1], -1).to(hidden.device)  # type: ignore[no-any-return]

    def _narrowed(self, tokens: Tensor) -> Any:
        """The head with only the rows of ``tokens``: the rest of a large matrix isn't even read."""
        linear = self._model.get_submodule(self._last)
        bias = None if linear.bias is None else self._rows(linear, "bias", tokens)
        narrow = _LinearRows(self._rows(linear, "weight", tokens), bias)
        return _replaced(self._model, self._last.split("."), narrow)

    def _rows(self, linear: nn.Module, name: str, tokens: Tensor) -> Tensor:
        weight = weight_of(linear, name)
        return weight[tokens.to(weight.device)].to(self._device)


def _replaced(module: Any, path: list[str], replacement: nn.Module) -> Any:
    """A copy of ``module`` with ``replacement`` at ``path``; other modules are shared, the original is unchanged."""
    inner = replacement if len(path) == 1 else _replaced(module._modules[path[0]], path[1:], replacement)
    other = copy.copy(module)
    vars(other).pop("forward", None)  # an instance's own forward (a hook) is bound to the original
    other._modules = {**module._modules, path[0]: inner}
    return other


class _LinearRows(nn.Module):
    """Some rows of a linear layer, with their biases."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


class _StubBody(nn.Module):
    """Replaces a model's body and returns given hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    @property
    def decoder(self) -> _StubBody:
        """Some families access their body's decoder."""
        return self

    def forward(self, *_: object, **__: object) -> _Output:
        return _Output(last_hidden_state=self.hidden)


class _Output(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]
    """A body's output. Members that only some families read, such as a router's logits, are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
