"""Where a student starts: a few of the target model's own layers, copied, and what is done to make them fit.

``copy`` is the paper's start (Appendix B.1). ``fold`` closes the gap that the removed layers leave: the last
kept layer before the gap gets, in its MLP's output matrix, the least-squares map that best predicts the hidden
state entering the next kept layer. The student stays a plain model of the same architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from post_server.ml.layers import Enough, layer_inputs, layers_of
from post_shared.errors import InvalidInput
from post_shared.language_model import LanguageModel
from post_shared.training import Progress, Reporter, ignore

RIDGE = 1e-3
SINKS = 2
"""First positions left out of the fit: their states are outliers (attention sinks)."""
ROWS = 16
"""Rows of hidden states that are multiplied in float64 at a time."""


class TargetStates:
    """The hidden states that enter the target's layers on ``blocks`` (packed token ids without padding, B x T each).

    Each is computed once, however many students are started from them.
    """

    def __init__(
        self, target: LanguageModel, blocks: Sequence[Tensor], report: Reporter = ignore, ahead: Sequence[int] = ()
    ) -> None:
        """``ahead`` are layers that will be asked for: the first pass takes them too."""
        self.target, self._blocks, self._report, self._ahead = target, blocks, report, ahead
        self.tokens = torch.cat(list(blocks))  # (N, T)
        self._known: dict[int, Tensor] = {}

    @torch.no_grad()
    def entering(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Layer -> (N, T, d), with one pass of the target for all of them that aren't known yet."""
        missing = [layer for layer in layers if layer not in self._known]
        missing = sorted({*missing, *self._ahead} - set(self._known)) if missing else []
        parts: dict[int, list[Tensor]] = {layer: [] for layer in missing}
        for done, block in enumerate(self._blocks if missing else (), 1):
            with layer_inputs(self.target, missing, stop=True) as caught:
                self.target.hidden(block)
            for layer, state in caught.items():
                parts[layer].append(state)
            self._report(Progress(done, len(self._blocks), "start"))
        self._known |= {layer: torch.cat(states) for layer, states in parts.items()}
        return {layer: self._known[layer] for layer in layers}


# --- the fold -----------------------------------------------------------------------------------------


def fold(student: LanguageModel, kept: Sequence[int], states: TargetStates) -> None:
    """Fold every gap between kept layers into the MLP output matrix of the layer before it, in place.

    With m the MLP output (n, d), r the residual it is added to, and H the hidden state that enters the next kept
    layer in the target, T solves min ‖r + m·T − H‖² + ridge·‖T‖², in float64; then W ← Tᵀ·W (and the bias b ← b·T).
    One pass of the student does it: a fit sees what the folds before it made.

    Raises:
        InvalidInput: the layers aren't of the kind "residual + MLP output", so there is nothing to fold into.
    """
    if kept[-1] != states.target.layers - 1:
        raise InvalidInput("keep the last layer: the head reads its output")
    gaps = {place: after for place, (layer, after) in enumerate(pairwise(kept)) if after != layer + 1}
    if not gaps:
        return
    entering = states.entering(list(gaps.values()))
    layers = getattr(*layers_of(student))
    matrices = {place: mlp_output(layers[place], student.hidden_size) for place in gaps}
    for place, matrix in matrices.items():
        _check_adds(student, layers[place], matrix, states.tokens[:1])
    with ExitStack() as hooks, torch.no_grad():
        for place, after in gaps.items():
            last = place == max(gaps)
            for hook in _fold_when_run(layers[place], matrices[place], entering[after], last=last):
                hooks.callback(hook.remove)
        with suppress(Enough):
            student.hidden(states.tokens)


def _fold_when_run(layer: nn.Module, matrix: nn.Module, wanted: Tensor, *, last: bool) -> list[RemovableHandle]:
    """Hooks that fit and fold the layer when it is run, and hand on the output that it has from then on."""
    made: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        made.append(output)

    def fit(_: nn.Module, __: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output  # (N, T, d)
        m = made.pop().reshape(whole.shape)  # some families flatten their rows
        by = _fitted(m, whole - m, wanted)
        _multiply_output(matrix, by)
        if last:
            raise Enough
        folded = whole - m + m @ by.to(m)
        return (folded, *output[1:]) if isinstance(output, tuple) else folded

    return [matrix.register_forward_hook(note), layer.register_forward_hook(fit)]


def _fitted(made: Tensor, residual: Tensor, wanted: Tensor) -> Tensor:
    """T (d, d), float64: the ridge regression of ``wanted - residual`` on ``made``, (N, T, d) each."""
    width = made.shape[-1]
    gram, cross = (torch.zeros(width, width, dtype=torch.float64, device=made.device) for _ in range(2))
    for at in range(0, len(made), ROWS):
        m, r, h = (
            states[at : at + ROWS, SINKS:].reshape(-1, width).to(made.device, torch.float64)
            for states in (made, residual, wanted)
        )
        gram += m.T @ m
        cross += m.T @ (h - r)
    scale = float(gram.diagonal().mean())
    fitted: Tensor = torch.linalg.solve(gram + RIDGE * scale * torch.eye(width).to(gram), cross)
    return fitted


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


@torch.no_grad()
def _check_adds(student: LanguageModel, layer: nn.Module, matrix: nn.Module, row: Tensor) -> None:
    """The layer's output must be "residual + what the matrix gives": doubling the one adds it to the other."""
    output, made = _output_of(student, layer, matrix, row)
    doubled = matrix.register_forward_hook(lambda _, __, value: 2 * value)
    try:
        output_of_double, _ = _output_of(student, layer, matrix, row)
    finally:
        doubled.remove()
    if not torch.allclose(output_of_double - output, made, rtol=1e-2, atol=1e-3 * float(made.abs().max())):
        raise InvalidInput(
            f"a layer of this {student.architecture} model isn't its residual plus its MLP's output, so nothing can be "
            "folded into it; use start='copy'"
        )


def _output_of(model: LanguageModel, layer: nn.Module, matrix: nn.Module, row: Tensor) -> tuple[Tensor, Tensor]:
    """(output of the layer, output of its MLP), (1, T, d) each; later layers aren't run."""
    caught: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        caught.append(output)

    def catch(_: nn.Module, __: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise Enough

    with ExitStack() as hooks, suppress(Enough):
        hooks.callback(matrix.register_forward_hook(note).remove)
        hooks.callback(layer.register_forward_hook(catch).remove)
        model.hidden(row)
    made, output = caught
    return output.float(), made.float()


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


STARTS: dict[str, Callable[[LanguageModel, Sequence[int], TargetStates], None]] = {
    "copy": lambda student, kept, states: None,
    "fold": fold,
}
"""How a copied student is prepared, by name. A better start is a new entry here."""
