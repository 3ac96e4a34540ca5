"""Models that are larger than a device: their weights are on several GPUs, in memory and on the disk.

accelerate places the weights, and loads those that aren't on the device for each call that needs them. Two things are
added here. A differentiated pass would keep every loaded weight for the backward pass, hence the whole model: instead
it keeps the weight's name, and the backward pass loads the weight again. And weights can be read wherever they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from post_shared.engine.devices import Memory

SHARE = 0.7
"""Share of each device's free memory that weights may take; the rest is for what a pass keeps."""


def free_memory() -> Memory:
    """Default limits for the weights: most of what is free on each GPU and in memory."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    free: Memory = {gpu: int(SHARE * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
    return {**free, "cpu": int(SHARE * psutil.virtual_memory().available)}


# --- locating weights ---------------------------------------------------------------------------------


def device_of(module: nn.Module) -> torch.device:
    """The device on which the module computes: its weight's, or the one that the weight is loaded to."""
    loader = _loader(module)
    if loader is not None:
        return torch.device(loader.execution_device)
    return next(module.parameters()).device


def devices_of(model: nn.Module) -> set[torch.device]:
    """The devices on which the model's modules compute."""
    return {device_of(module) for module in model.modules() if any(True for _ in module.parameters(recurse=False))}


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The module's own weight of that name, wherever it is stored; an offloaded one can be on any device."""
    weight: Tensor = module._parameters[name]  # type: ignore[assignment]
    loader = _loader(module)
    if loader is not None and weight.is_meta:
        return loader.weights_map[name]  # type: ignore[no-any-return]
    gather = getattr(weight, "full_tensor", None)  # a weight that is sharded over processes
    return weight if gather is None else gather()


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    """Every distinct weight of the model, one by one, in the order of ``model.parameters()``."""
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                yield weight_of(module, name)


def copy_whole(model: nn.Module) -> Any:
    """An independent copy of the model, with all weights on the device of its embeddings."""
    hooks = [hook for module in model.modules() if (hook := vars(module).get("_hf_hook")) is not None]
    other: Any = copy.deepcopy(model, {id(hook): hook for hook in hooks})
    for module in other.modules():
        for name in [name for name, weight in module._parameters.items() if weight is not None and weight.is_meta]:
            module._parameters[name] = nn.Parameter(weight_of(module, name).clone(), requires_grad=False)
    device = device_of(other.get_input_embeddings())
    for module in other.modules():
        for name in ("_hf_hook", "_old_forward", "forward", "to", "cuda", "hf_device_map"):
            vars(module).pop(name, None)
    if hooks:
        other.tie_weights()
    return other.to(device)


def _loader(module: nn.Module) -> Any:
    """The hook that loads the module's own weights for a call, if there is one."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", [hook])
    return next((hook for hook in hooks if getattr(hook, "offload", False)), None)


# --- backward pass ------------------------------------------------------------------------------------


def reload_in_backward(model: nn.Module) -> None:
    """Make differentiated passes reload offloaded weights in the backward pass instead of keeping them."""
    for module in model.modules():
        loader = _loader(module)
        if loader is not None:
            vars(module)["forward"] = _ReloadingForward(module, vars(module)["forward"], loader)


_observers: list[Callable[[Tensor], object]] = []


@contextmanager
def observe_saved(observe: Callable[[Tensor], object]) -> Iterator[None]:
    """Within it, ``observe`` is called with each tensor that offloaded modules save for the backward pass: autograd's
    own hooks don't see those if they were set outside the module."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


@dataclass(frozen=True)
class _WeightView:
    """A view of a weight: the weight's name, and the view's layout."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _ReloadingForward:
    """A module's forward that saves views by name instead of the weights themselves."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], loader: Any) -> None:
        self._module, self._forward, self._loader = module, forward, loader
        self.__wrapped__ = forward  # inspect.signature reads it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return self._forward(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Tensor | _WeightView:
        storage = tensor.untyped_storage().data_ptr()
        for name, weight in self._module._parameters.items():
            if weight is not None and not weight.is_meta and weight.untyped_storage().data_ptr() == storage:
                return _WeightView(
                    name, tensor.size(), tensor.stride(), int(tensor.storage_offset() - weight.storage_offset())
                )
        for observe in _observers:
            observe(tensor)
        return tensor

    def _unpack(self, saved: Tensor | _WeightView) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        weight: Tensor = self._loader.weights_map[saved.name].to(self._loader.execution_device)
        return weight.as_strided(saved.size, saved.stride, weight.storage_offset() + saved.offset)
