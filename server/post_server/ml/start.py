"""Where a student starts: a few of the target model's own layers, copied, and what is done to make them fit.

``copy`` is the paper's start (Appendix B.1). ``fold`` closes the gap that the removed layers leave: the last
kept layer before the gap gets, in its MLP's output matrix, the least-squares map that best predicts the hidden
state entering the next kept layer. The student stays a plain model of the same architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from post_shared.errors import InvalidInput
from post_shared.language_model import LanguageModel
from post_shared.training import Progress, Reporter, ignore

RIDGE = 1e-3
SINKS = 2
"""First positions left out of the fit: their states are outliers (attention sinks)."""


def chosen_layers(keep: int | Sequence[int], layers: int) -> list[int]:
    """Indices of the kept layers. A number takes half from each end, the larger half from the front.

    >>> chosen_layers(4, 30)
    [0, 1, 28, 29]

    Raises:
        InvalidInput: indices out of range, repeated or out of order, or nothing left to leave out.
    """
    if isinstance(keep, int):
        if not 1 <= keep <= layers:
            raise InvalidInput(f"keep between 1 and {layers} layers, not {keep}")
        front = (keep + 1) // 2
        return [*range(front), *range(layers - (keep - front), layers)]
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= layers:
        raise InvalidInput(f"the layers to keep are rising indices in 0..{layers - 1}, not {kept}")
    return kept


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
        model = copy.deepcopy(target.model)
    finally:
        setattr(owner, name, every)
    model.config.num_hidden_layers = len(kept)
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        model.config.layer_types = [types[at] for at in kept]
    for at, layer in enumerate(getattr(*layers_of(_wrapped(model, target)))):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = at
    return _wrapped(model.float(), target)


def _wrapped(model: Any, target: LanguageModel) -> LanguageModel:
    return LanguageModel(model, target.tokenizer)


# --- the fold -----------------------------------------------------------------------------------------


def fold(
    target: LanguageModel,
    student: LanguageModel,
    kept: Sequence[int],
    blocks: Sequence[Tensor],
    report: Reporter = ignore,
) -> None:
    """Fold every gap between kept layers into the MLP output matrix of the layer before it, in place.

    ``blocks`` are packed token ids (B, T) without padding. With m the MLP output (n, d), r the residual it is
    added to, and H the hidden state that enters the next kept layer in the target, T solves
    min ‖r + m·T − H‖² + ridge·‖T‖², in float64; then W ← Tᵀ·W (and the bias b ← b·T).

    Raises:
        InvalidInput: the layers aren't of the kind "residual + MLP output", so there is nothing to fold into.
    """
    if kept[-1] != target.layers - 1:
        raise InvalidInput("keep the last layer: the head reads its output")
    gaps = [(place, after) for place, (layer, after) in enumerate(pairwise(kept)) if after != layer + 1]
    for done, (place, entering) in enumerate(gaps):

        def tell(block: int, done: int = done) -> None:
            report(Progress(done * len(blocks) + block, len(gaps) * len(blocks), "start"))

        _fold_gap(target, student, place, entering, blocks, tell)


def _fold_gap(
    target: LanguageModel,
    student: LanguageModel,
    place: int,
    entering: int,
    blocks: Sequence[Tensor],
    tell: Callable[[int], None],
) -> None:
    """Fit on the student as it is now (earlier gaps folded), so that later gaps see what they will get."""
    matrix = mlp_output(getattr(*layers_of(student))[place], student.hidden_size)
    _check_adds(student, place, matrix, blocks[0])
    width = student.hidden_size
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(width, width, dtype=torch.float64)
    for at, block in enumerate(blocks, 1):
        wanted = _input_of(target, entering, block)
        got, made = _output_of(student, place, matrix, block)
        m = made[:, SINKS:].reshape(-1, width).double().cpu()
        residual = got[:, SINKS:].reshape(-1, width).double().cpu() - m
        h = wanted[:, SINKS:].reshape(-1, width).double().cpu()
        gram += m.T @ m
        cross += m.T @ (h - residual)
        tell(at)
    scale = float(gram.diagonal().mean())
    fitted = torch.linalg.solve(gram + RIDGE * scale * torch.eye(width, dtype=torch.float64), cross)  # (d, d)
    _multiply_output(matrix, fitted)


def mlp_output(layer: nn.Module, width: int) -> nn.Module:
    """The matrix that ends a layer's MLP: the last one that gives ``width`` from something wider.

    Raises:
        InvalidInput: there is none.
    """
    sizes = [(module, *_sizes(module)) for module in layer.modules()]
    found = [module for module, inputs, outputs in sizes if outputs == width and inputs > width]
    if not found:
        raise InvalidInput("the layer's MLP has no output matrix to fold into; use start='copy'")
    return found[-1]


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a matrix module, whichever way round it keeps its weight; zeros for any other module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return 0, 0
    if isinstance(module, nn.Linear):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight.shape[1]  # GPT-2's Conv1D keeps it transposed


def _check_adds(student: LanguageModel, place: int, matrix: nn.Module, block: Tensor) -> None:
    """The layer's output must be "residual + what the matrix gives": doubling the one adds it to the other."""
    output, made = _output_of(student, place, matrix, block[:1])
    doubled = matrix.register_forward_hook(lambda _, __, value: 2 * value)
    try:
        output_of_double, _ = _output_of(student, place, matrix, block[:1])
    finally:
        doubled.remove()
    if not torch.allclose(output_of_double - output, made, rtol=1e-2, atol=1e-3 * float(made.abs().max())):
        raise InvalidInput(
            f"a layer of this {student.architecture} model isn't its residual plus its MLP's output, so nothing can be "
            "folded into it; use start='copy'"
        )


@torch.no_grad()
def _multiply_output(matrix: nn.Module, by: Tensor) -> None:
    """Make the module compute (x·W + b)·T instead of x·W + b."""
    weight: Tensor = matrix.weight  # type: ignore[assignment]
    by = by.to(weight.device)
    outputs_first = isinstance(matrix, nn.Linear)
    new = by.T @ weight.double() if outputs_first else weight.double() @ by
    weight.copy_(new.to(weight.dtype))
    bias = getattr(matrix, "bias", None)
    if isinstance(bias, Tensor):
        bias.copy_((bias.double() @ by).to(bias.dtype))


class _Enough(Exception):
    """Ends a forward pass once what was wanted is known."""


@contextmanager
def _stopping(module: nn.Module, hook: Callable[..., None], *, before: bool) -> Iterator[None]:
    handle = (
        module.register_forward_pre_hook(hook, with_kwargs=True)
        if before
        else module.register_forward_hook(hook, with_kwargs=True)
    )
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def _input_of(model: LanguageModel, layer: int, block: Tensor) -> Tensor:
    """The hidden state (B, T, d) that enters layer ``layer``; later layers aren't run."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    with _stopping(getattr(*layers_of(model))[layer], catch, before=True):
        model.hidden(block)
    return caught[0].float()


@torch.no_grad()
def _output_of(model: LanguageModel, layer: int, matrix: nn.Module, block: Tensor) -> tuple[Tensor, Tensor]:
    """(output of layer ``layer``, output of its MLP), (B, T, d) each."""
    caught: list[Tensor] = []
    made: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        made.append(output)

    def catch(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    handle = matrix.register_forward_hook(note)
    try:
        with _stopping(getattr(*layers_of(model))[layer], catch, before=False):
            model.hidden(block)
    finally:
        handle.remove()
    return caught[0].float(), made[-1].float()


STARTS: dict[str, Callable[[LanguageModel, LanguageModel, Sequence[int], Sequence[Tensor], Reporter], None]] = {
    "copy": lambda target, student, kept, blocks, report: None,
    "fold": fold,
}
"""How a copied student is prepared, by name. A better start is a new entry here."""
