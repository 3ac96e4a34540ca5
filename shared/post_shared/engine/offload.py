"""Models that are larger than a device: their weights lie on several GPUs, in memory and on the disk.

accelerate places them, and loads what isn't on a device into it for the call that needs it. Two things are added.
A pass that is differentiated would keep every weight that it loaded until the way back, so the whole model after all:
here it keeps the weight's name, and the way back loads it again. And whoever needs a weight itself finds it.
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
"""Of the free memory of each device that weights may take; the rest is for what a pass keeps."""


def free_memory() -> Memory:
    """What weights may take where nobody says it: most of what is free on each GPU and in memory."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    free: Memory = {gpu: int(SHARE * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
    return {**free, "cpu": int(SHARE * psutil.virtual_memory().available)}


# --- where a weight is --------------------------------------------------------------------------------


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: where its weight is, or is loaded to."""
    loader = _loader(module)
    if loader is not None:
        return torch.device(loader.execution_device)
    return next(module.parameters()).device


def devices_of(model: nn.Module) -> set[torch.device]:
    """Where the model's modules compute."""
    return {device_of(module) for module in model.modules() if any(True for _ in module.parameters(recurse=False))}


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The module's own weight of that name, from wherever it is; from memory or disk on no particular device."""
    weight: Tensor = module._parameters[name]  # type: ignore[assignment]
    loader = _loader(module)
    if loader is not None and weight.is_meta:
        return loader.weights_map[name]  # type: ignore[no-any-return]
    gather = getattr(weight, "full_tensor", None)  # of a weight that several processes share
    return weight if gather is None else gather()


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    """Every distinct weight of the model, one after the other, in the order of ``model.parameters()``."""
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                yield weight_of(module, name)


def copy_whole(model: nn.Module) -> Any:
    """A copy of the model on its own, with all weights on the device of its embeddings."""
    hooks = [hook for module in model.modules() if (hook := vars(module).get("_hf_hook")) is not None]
    other: Any = copy.deepcopy(model, {id(hook): hook for hook in hooks})
    for module in other.modules():
        for name in [name for name, weight in module._parameters.items() if weight is not None and weight.is_meta]:
            module._parameters[name] = nn.Parameter(weight_of(module, name).clone(), requires_grad=False)
    place = device_of(other.get_input_embeddings())
    for module in other.modules():
        for name in ("_hf_hook", "_old_forward", "forward", "to", "cuda", "hf_device_map"):
            vars(module).pop(name, None)
    if hooks:
        other.tie_weights()
    return other.to(place)


def _loader(module: nn.Module) -> Any:
    """The hook that loads the module's own weights for a call, if there is one."""
    hook = vars(module).get("_hf_hook")
    every = getattr(hook, "hooks", [hook])
    return next((each for each in every if getattr(each, "offload", False)), None)


# --- the way back -------------------------------------------------------------------------------------


def load_again(model: nn.Module) -> None:
    """Let passes that are differentiated keep no weight that was loaded for one call."""
    for module in model.modules():
        loader = _loader(module)
        if loader is not None:
            vars(module)["forward"] = _Forgetful(module, vars(module)["forward"], loader)


_watchers: list[Callable[[Tensor], object]] = []


@contextmanager
def watched(watch: Callable[[Tensor], object]) -> Iterator[None]:
    """Within it, ``watch`` sees what the passes of offloaded modules keep for the way back: there, hooks of autograd
    that were set outside see nothing."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


@dataclass(frozen=True)
class _Place:
    """A view of a weight: which one, and what of it."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Forgetful:
    """A module's forward that keeps places of weights in the place of weights."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], loader: Any) -> None:
        self._module, self._forward, self._loader = module, forward, loader
        self.__wrapped__ = forward  # for those who ask for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return self._forward(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Tensor | _Place:
        storage = tensor.untyped_storage().data_ptr()
        for name, weight in self._module._parameters.items():
            if weight is not None and not weight.is_meta and weight.untyped_storage().data_ptr() == storage:
                return _Place(
                    name, tensor.size(), tensor.stride(), int(tensor.storage_offset() - weight.storage_offset())
                )
        for watch in _watchers:
            watch(tensor)
        return tensor

    def _unpack(self, kept: Tensor | _Place) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        weight: Tensor = self._loader.weights_map[kept.name].to(self._loader.execution_device)
        return weight.as_strided(kept.size, kept.stride, weight.storage_offset() + kept.offset)
