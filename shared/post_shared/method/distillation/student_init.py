"""Initialisation of a student from copied layers of the target.

``copy`` is the paper's (App. B.1): nothing is changed. ``least_squares`` closes the gaps that removed layers leave: the
MLP output matrix of the last kept layer before a gap is multiplied by the least-squares map that best predicts the
hidden state entering the next kept layer. Where the layer ends in a norm, as in BERT, that norm is replaced by the one
of the last removed layer, and the map predicts this norm's input. The student stays a plain model of its architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from post_shared.errors import InvalidInput
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import StopForward, layer_inputs, layers_of
from post_shared.training.progress import Progress, ProgressCallback, ignore

RIDGE = 1e-3
NO_GAIN = 1e-6
"""Added to a norm's squared gain, so that channels with almost no gain are not inverted."""
SINKS = 2
"""Leading positions left out of the fit: their states are outliers (attention sinks)."""
ROWS = 16
"""Rows of hidden states that are multiplied in float64 at a time, to bound memory."""


class TargetStates:
    """The inputs of the target's layers on ``blocks`` (packed token ids without padding, B x T each).

    Each is computed once, however many students are initialised from it.
    """

    def __init__(
        self,
        target: LanguageModel,
        blocks: Sequence[Tensor],
        on_progress: ProgressCallback = ignore,
        prefetch: Sequence[int] = (),
    ) -> None:
        """``prefetch`` are layers that will be needed later; the first pass records them too."""
        self.target, self._blocks, self._on_progress, self._prefetch = target, blocks, on_progress, prefetch
        self.tokens = torch.cat(list(blocks))  # (N, T)
        self._states: dict[int, Tensor] = {}

    @torch.no_grad()
    def entering(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Layer -> input (N, T, d); one pass of the target records all that are missing."""
        missing = [layer for layer in layers if layer not in self._states]
        missing = sorted({*missing, *self._prefetch} - set(self._states)) if missing else []
        recorded: dict[int, list[Tensor]] = {layer: [] for layer in missing}
        for done, block in enumerate(self._blocks if missing else (), 1):
            with layer_inputs(self.target, missing, stop=True) as inputs:
                self.target.hidden(block)
            for layer, state in inputs.items():
                recorded[layer].append(state)
            self._on_progress(Progress(done, len(self._blocks), "start"))
        self._states |= {layer: torch.cat(states) for layer, states in recorded.items()}
        return {layer: self._states[layer] for layer in layers}


# --- least squares ------------------------------------------------------------------------------------


def least_squares(student: LanguageModel, kept: Sequence[int], states: TargetStates) -> None:
    """Fit the MLP output matrix of each kept layer before a gap, in place, to make up for the removed layers.

    With m the MLP output (n, d), r the residual it is added to, and H the hidden state that enters the next kept
    layer in the target, T solves min ‖r + m·T − H‖² + ridge·‖T‖², in float64; then W ← Tᵀ·W (and the bias b ← b·T).
    It takes one pass of the student, so each fit sees the effect of the earlier ones. A layer that ends in a norm gets
    the norm of the last removed layer, with gain γ and offset β; H is then (hidden state - β) / γ, scaled to r + m.

    Raises:
        InvalidInput: the last layer isn't kept, or a layer isn't "residual + MLP output", with or without a final norm.
    """
    if kept[-1] != states.target.layers - 1:
        raise InvalidInput("keep the last layer: the head reads its output")
    gaps = {index: following for index, (layer, following) in enumerate(pairwise(kept)) if following != layer + 1}
    if not gaps:
        return
    entering = states.entering(list(gaps.values()))
    layers = getattr(*layers_of(student))
    matrices = {index: mlp_output(layers[index], student.hidden_size) for index in gaps}
    norms = {index: ending_norm(student, layers[index], states.tokens[:1]) for index in gaps}
    for index, matrix in matrices.items():
        _check_is_sum(student, layers[index], matrix, norms[index], states.tokens[:1])
    target_layers = getattr(*layers_of(states.target))
    with ExitStack() as hooks, torch.no_grad():
        for index, following in gaps.items():
            last, goal, norm = index == max(gaps), entering[following], None
            if norms[index]:
                norm = layers[index].get_submodule(norms[index])
                goal = _replace_norm(norm, target_layers[following - 1].get_submodule(norms[index]), goal)
            for hook in _fit_in_forward(layers[index], matrices[index], norm, goal, last=last):
                hooks.callback(hook.remove)
        with suppress(StopForward):
            student.hidden(states.tokens)


def _fit_in_forward(
    layer: nn.Module, matrix: nn.Module, norm: nn.Module | None, goal: Tensor, *, last: bool
) -> list[RemovableHandle]:
    """Hooks that fit ``matrix`` when the layer runs, and return the layer's output after the fit."""
    mlp_outputs: list[Tensor] = []
    norm_inputs: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Tensor) -> None:
        mlp_outputs.append(output)

    def fit(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output  # (N, T, d)
        total = norm_inputs.pop() if norm is not None else hidden  # residual + MLP output
        m = mlp_outputs.pop().reshape(total.shape)  # some families flatten their rows
        h = goal if norm is None else goal * _mean_deviation(total)
        t = _ridge_regression(m, total - m, h)
        _multiply_output(matrix, t)
        if last:
            raise StopForward
        fitted = total - m + m @ t.to(m)
        fitted = fitted if norm is None else norm(fitted)
        return (fitted, *output[1:]) if isinstance(output, tuple) else fitted

    hooks = [matrix.register_forward_hook(record), layer.register_forward_hook(fit)]
    if norm is not None:
        hooks.append(norm.register_forward_pre_hook(lambda _, inputs: norm_inputs.append(inputs[0])))
    return hooks


def _replace_norm(norm: nn.Module, other: nn.Module, output: Tensor) -> Tensor:
    """Load the weights of ``other`` into ``norm``; returns the input (N, T, d) of which ``other`` makes ``output``, up
    to its scale."""
    weights = other.state_dict()
    norm.load_state_dict(weights)
    gain, offset = weights["weight"].to(output.device).float(), weights.get("bias", torch.zeros(())).to(output.device)
    inverted: Tensor = (output.float() - offset.float()) * gain / (gain**2 + NO_GAIN)
    return inverted


def _mean_deviation(states: Tensor) -> Tensor:
    """The mean standard deviation over the width of states (N, T, d), the leading positions left out."""
    return states[:, SINKS:].float().std(-1).mean()


def _ridge_regression(mlp: Tensor, residual: Tensor, goal: Tensor) -> Tensor:
    """T (d, d), float64: the ridge regression of ``goal - residual`` on ``mlp``, (N, T, d) each."""
    width = mlp.shape[-1]
    gram, cross = (torch.zeros(width, width, dtype=torch.float64, device=mlp.device) for _ in range(2))
    for start in range(0, len(mlp), ROWS):
        m, r, h = (
            states[start : start + ROWS, SINKS:].reshape(-1, width).to(mlp.device, torch.float64)
            for states in (mlp, residual, goal)
        )
        gram += m.T @ m
        cross += m.T @ (h - r)
    scale = float(gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram + RIDGE * scale * torch.eye(width).to(gram), cross)
    return solution


def mlp_output(layer: nn.Module, width: int) -> nn.Module:
    """The output matrix of a layer's MLP: the last matrix with ``width`` outputs and more inputs.

    Raises:
        InvalidInput: there is none.
    """
    sizes = [(module, *_sizes(module)) for module in layer.modules()]
    matrices = [module for module, inputs, outputs in sizes if outputs == width and inputs > width]
    if not matrices:
        raise InvalidInput("the layer's MLP has no output matrix to fit; use student_init='copy'")
    return matrices[-1]


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a matrix module, transposed or not; (0, 0) for any other module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return 0, 0
    if isinstance(module, nn.Linear):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight.shape[1]  # GPT-2's Conv1D stores it transposed


@torch.no_grad()
def ending_norm(student: LanguageModel, layer: nn.Module, row: Tensor) -> str:
    """The name of the norm whose output is the layer's output; empty if the layer ends in a sum."""
    norm_outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: norm_outputs.update({name: output})

    outputs: list[Tensor] = []
    with ExitStack() as hooks, suppress(StopForward):
        for name, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.shape == (student.hidden_size,):
                hooks.callback(module.register_forward_hook(record(name)).remove)
        hooks.callback(layer.register_forward_hook(_record_and_stop(outputs)).remove)
        student.hidden(row)
    equal = [name for name, made in norm_outputs.items() if torch.equal(made.reshape(outputs[0].shape), outputs[0])]
    return equal[-1] if equal else ""


@torch.no_grad()
def _check_is_sum(student: LanguageModel, layer: nn.Module, matrix: nn.Module, norm: str, row: Tensor) -> None:
    """Check that the layer, before its norm, ends in "residual + matrix output": doubling the output adds it once."""
    norm_inputs: list[Tensor] = []
    hook = layer.get_submodule(norm).register_forward_pre_hook(lambda _, inputs: norm_inputs.append(inputs[0].float()))

    def run() -> tuple[Tensor, Tensor]:
        output, mlp = _outputs(student, layer, matrix, row)
        return (norm_inputs[-1] if norm else output), mlp

    total, mlp = run()
    doubling = matrix.register_forward_hook(lambda _, __, value: 2 * value)
    try:
        total_doubled, _ = run()
    finally:
        hook.remove()
        doubling.remove()
    if not torch.allclose(total_doubled - total, mlp, rtol=1e-2, atol=1e-3 * float(mlp.abs().max())):
        raise InvalidInput(
            f"a layer of this {student.architecture} model isn't its residual plus its MLP's output, so it can't be "
            "fitted; use student_init='copy'"
        )


def _outputs(model: LanguageModel, layer: nn.Module, matrix: nn.Module, row: Tensor) -> tuple[Tensor, Tensor]:
    """(output of the layer, output of its MLP), (1, T, d) each; later layers aren't run."""
    outputs: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append(output)

    with ExitStack() as hooks, suppress(StopForward):
        hooks.callback(matrix.register_forward_hook(record).remove)
        hooks.callback(layer.register_forward_hook(_record_and_stop(outputs)).remove)
        model.hidden(row)
    mlp, output = outputs
    return output.float(), mlp.float()


def _record_and_stop(outputs: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that records a layer's output and ends the pass."""

    def record(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        raise StopForward

    return record


@torch.no_grad()
def _multiply_output(matrix: nn.Module, t: Tensor) -> None:
    """Make the module compute (x·W + b)·T instead of x·W + b."""
    weight: Tensor = matrix.weight  # type: ignore[assignment]
    t = t.to(weight.device)
    outputs_first = isinstance(matrix, nn.Linear)
    product = t.T @ weight.double() if outputs_first else weight.double() @ t
    weight.copy_(product.to(weight.dtype))
    bias = getattr(matrix, "bias", None)
    if isinstance(bias, Tensor):
        bias.copy_((bias.double() @ t).to(bias.dtype))


STUDENT_INITS: dict[str, Callable[[LanguageModel, Sequence[int], TargetStates], None]] = {
    "copy": lambda student, kept, states: None,
    "least_squares": least_squares,
}
"""Initialisations of a copied student by name. A new one is a new entry here."""
