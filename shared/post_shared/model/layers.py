"""A model's layers: building a student from some of them, and capturing their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from post_shared.engine.offload import copy_whole
from post_shared.errors import InvalidInput
from post_shared.model.language_model import LanguageModel

RELOADED = 1e-3
"""Largest relative difference of a reloaded student's hidden states; rounding stays far below it."""


def layers_of(model: LanguageModel) -> tuple[nn.Module, str]:
    """The list of layers, as the module that owns it and the attribute's name.

    Raises:
        InvalidInput: the model doesn't keep its layers in one list.
    """
    for module in model.body.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == model.layers:
                return module, name
    raise InvalidInput(f"a {model.architecture} model doesn't keep its {model.layers} layers in one list")


def copy_student(target: LanguageModel, kept: Sequence[int]) -> LanguageModel:
    """A student with the ``kept`` layers and everything else of the target: a float32 copy on the same device."""
    owner, name = layers_of(target)
    layers = getattr(owner, name)
    setattr(owner, name, nn.ModuleList([layers[index] for index in kept]))
    try:
        model = copy_whole(target.model)
    finally:
        setattr(owner, name, layers)
    model.config.num_hidden_layers = len(kept)
    for setting, value in vars(model.config).items():  # settings per layer: sliding windows, positions, ...
        if isinstance(value, list | tuple) and len(value) == target.layers:
            setattr(model.config, setting, [value[index] for index in kept])
    for index, layer in enumerate(getattr(*layers_of(_wrapped(model, target)))):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    return _wrapped(model.float(), target)


@torch.no_grad()
def check_loads(student: LanguageModel) -> None:
    """Check that a model built from the student's configuration and weights computes the same.

    A family may have its own settings per layer, or depend on a layer's index.

    Raises:
        InvalidInput: it can't be built, or computes something else.
    """
    tokens = torch.arange(8)[None] % student.vocabulary
    try:
        with torch.device(student.device):
            config = type(student.config).from_dict(student.config.to_dict())
            loaded = type(student.model)(config).float()
        loaded.load_state_dict(student.model.state_dict())
        actual = _wrapped(loaded, student).hidden(tokens)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidInput(f"a {student.architecture} model with fewer layers can't be reloaded: {error}") from error
    expected = student.hidden(tokens)
    if not float((actual - expected).norm()) <= RELOADED * float(expected.norm()):
        raise InvalidInput(
            f"a {student.architecture} model with these layers would compute something else once it is reloaded: "
            "in this family, what a layer does may depend on its place; keep layers 0, 1, 2, … or use another target"
        )


def _wrapped(model: Any, target: LanguageModel) -> LanguageModel:
    return LanguageModel(model, target.tokenizer)


class StopForward(Exception):
    """Ends a forward pass once the wanted inputs are captured."""


@contextmanager
def layer_inputs(model: LanguageModel, layers: Iterable[int], *, stop: bool = False) -> Iterator[dict[int, Tensor]]:
    """Within it, a pass of ``model`` fills the dictionary with the input (B, T, d) of each of ``layers``.

    With ``stop``, the pass ends at the last of ``layers``.
    """
    inputs: dict[int, Tensor] = {}
    wanted = sorted(set(layers))
    modules = getattr(*layers_of(model))

    def capture(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[layer] = (args[0] if args else kwargs["hidden_states"]).to(model.device)
            if stop and layer == wanted[-1]:
                raise StopForward

        return hook

    with ExitStack() as hooks:
        for layer in wanted:
            hooks.callback(modules[layer].register_forward_pre_hook(capture(layer), with_kwargs=True).remove)
        with suppress(StopForward):
            yield inputs
