"""A model's layers: which ones a student keeps, the student that is made of them, and what enters them."""

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
"""Largest share of the hidden states' norm by which a loaded student may differ: rounding is far below."""


def layers_of(model: LanguageModel) -> tuple[nn.Module, str]:
    """The list of layers and its place: the module that owns it and the attribute's name.

    Raises:
        InvalidInput: the model doesn't keep its layers in one list.
    """
    for module in model.body.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == model.layers:
                return module, name
    raise InvalidInput(f"a {model.architecture} model doesn't keep its {model.layers} layers in one list")


def copy_student(target: LanguageModel, kept: Sequence[int]) -> LanguageModel:
    """A student of the kept layers with everything else as in the target; a copy, float32, on the same device."""
    owner, name = layers_of(target)
    every = getattr(owner, name)
    rest = nn.ModuleList([every[at] for at in kept])
    setattr(owner, name, rest)
    try:
        model = copy_whole(target.model)
    finally:
        setattr(owner, name, every)
    model.config.num_hidden_layers = len(kept)
    for setting, value in vars(model.config).items():  # which layers slide, which have no positions, ...
        if isinstance(value, list | tuple) and len(value) == target.layers:
            setattr(model.config, setting, [value[at] for at in kept])
    for at, layer in enumerate(getattr(*layers_of(_wrapped(model, target)))):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = at
    return _wrapped(model.float(), target)


@torch.no_grad()
def check_loads(student: LanguageModel) -> None:
    """Raise :class:`InvalidInput` if a model of the student's configuration and weights isn't the student.

    A family may say by settings of its own what each layer does, or take a layer's place into account.
    """
    tokens = torch.arange(8)[None] % student.vocabulary
    try:
        with torch.device(student.device):
            config = type(student.config).from_dict(student.config.to_dict())
            loaded = type(student.model)(config).float()
        loaded.load_state_dict(student.model.state_dict())
        found = _wrapped(loaded, student).hidden(tokens)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"a {student.architecture} model of fewer layers could not be loaded again: {error}"
        ) from error
    expected = student.hidden(tokens)
    if not float((found - expected).norm()) <= RELOADED * float(expected.norm()):
        raise InvalidInput(
            f"a {student.architecture} model of these layers would compute something else once it is loaded again: "
            "the family makes what a layer does depend on its place; keep layers 0, 1, 2, … or use another target"
        )


def _wrapped(model: Any, target: LanguageModel) -> LanguageModel:
    return LanguageModel(model, target.tokenizer)


class Enough(Exception):
    """Ends a forward pass once what was wanted is known."""


@contextmanager
def layer_inputs(model: LanguageModel, layers: Iterable[int], *, stop: bool = False) -> Iterator[dict[int, Tensor]]:
    """Within it, a pass of ``model`` leaves here the hidden state (B, T, d) that entered each of ``layers``.

    With ``stop`` later layers aren't run: the pass ends at the last of ``layers``.
    """
    caught: dict[int, Tensor] = {}
    wanted = sorted(set(layers))
    places = getattr(*layers_of(model))

    def catcher(layer: int) -> Callable[..., None]:
        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught[layer] = (args[0] if args else kwargs["hidden_states"]).to(model.device)
            if stop and layer == wanted[-1]:
                raise Enough

        return catch

    with ExitStack() as hooks:
        for layer in wanted:
            hooks.callback(places[layer].register_forward_pre_hook(catcher(layer), with_kwargs=True).remove)
        with suppress(Enough):
            yield caught
