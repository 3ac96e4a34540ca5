"""Where a student starts: a few of the target model's own layers, copied, and what is done to make them fit.

``copy`` is the paper's start (Appendix B.1). ``fold`` closes the gap that the removed layers leave: the last
kept layer before the gap gets, in its MLP's output matrix, the least-squares map that best predicts the hidden
state entering the next kept layer. Where a norm ends the layer, as in BERT, it becomes that of the last removed
layer, and the map predicts what that was given. The student stays a plain model of the same architecture.
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
from post_shared.model.layers import Enough, layer_inputs, layers_of
from post_shared.training.progress import Progress, ProgressCallback, ignore

RIDGE = 1e-3
NO_GAIN = 1e-6
"""Squared gain of a norm below which nothing is read from what it made."""
SINKS = 2
"""First positions left out of the fit: their states are outliers (attention sinks)."""
ROWS = 16
"""Rows of hidden states that are multiplied in float64 at a time."""


class TargetStates:
    """The hidden states that enter the target's layers on ``blocks`` (packed token ids without padding, B x T each).

    Each is computed once, however many students are started from them.
    """

    def __init__(
        self,
        target: LanguageModel,
        blocks: Sequence[Tensor],
        on_progress: ProgressCallback = ignore,
        ahead: Sequence[int] = (),
    ) -> None:
        """``ahead`` are layers that will be asked for: the first pass takes them too."""
        self.target, self._blocks, self._report, self._ahead = target, blocks, on_progress, ahead
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


def least_squares(student: LanguageModel, kept: Sequence[int], states: TargetStates) -> None:
    """Fold every gap between kept layers into the MLP output matrix of the layer before it, in place.

    With m the MLP output (n, d), r the residual it is added to, and H the hidden state that enters the next kept
    layer in the target, T solves min ‖r + m·T − H‖² + ridge·‖T‖², in float64; then W ← Tᵀ·W (and the bias b ← b·T).
    One pass of the student does it: a fit sees what the folds before it made. A layer that ends in a norm takes over
    that of the last removed layer, with gain γ and offset β; H is then (the hidden state - β) / γ, as large as r + m.

    Raises:
        InvalidInput: the layers aren't of the kind "residual + MLP output", with or without a norm of it, so there is
            nothing to fold into.
    """
    if kept[-1] != states.target.layers - 1:
        raise InvalidInput("keep the last layer: the head reads its output")
    gaps = {place: after for place, (layer, after) in enumerate(pairwise(kept)) if after != layer + 1}
    if not gaps:
        return
    entering = states.entering(list(gaps.values()))
    layers = getattr(*layers_of(student))
    matrices = {place: mlp_output(layers[place], student.hidden_size) for place in gaps}
    names = {place: ending_norm(student, layers[place], states.tokens[:1]) for place in gaps}
    for place, matrix in matrices.items():
        _check_adds(student, layers[place], matrix, names[place], states.tokens[:1])
    before = getattr(*layers_of(states.target))
    with ExitStack() as hooks, torch.no_grad():
        for place, after in gaps.items():
            last, wanted, norm = place == max(gaps), entering[after], None
            if names[place]:
                norm = layers[place].get_submodule(names[place])
                wanted = _take_over(norm, before[after - 1].get_submodule(names[place]), wanted)
            for hook in _fold_when_run(layers[place], matrices[place], norm, wanted, last=last):
                hooks.callback(hook.remove)
        with suppress(Enough):
            student.hidden(states.tokens)


def _fold_when_run(
    layer: nn.Module, matrix: nn.Module, norm: nn.Module | None, wanted: Tensor, *, last: bool
) -> list[RemovableHandle]:
    """Hooks that fit and fold the layer when it is run, and hand on the output that it has from then on."""
    made: list[Tensor] = []
    sums: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        made.append(output)

    def fit(_: nn.Module, __: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output  # (N, T, d)
        both = sums.pop() if norm is not None else whole  # residual + MLP output
        m = made.pop().reshape(both.shape)  # some families flatten their rows
        goal = wanted if norm is None else wanted * _spread(both)
        by = _fitted(m, both - m, goal)
        _multiply_output(matrix, by)
        if last:
            raise Enough
        folded = both - m + m @ by.to(m)
        folded = folded if norm is None else norm(folded)
        return (folded, *output[1:]) if isinstance(output, tuple) else folded

    hooks = [matrix.register_forward_hook(note), layer.register_forward_hook(fit)]
    if norm is not None:
        hooks.append(norm.register_forward_pre_hook(lambda _, given: sums.append(given[0])))
    return hooks


def _take_over(norm: nn.Module, other: nn.Module, made: Tensor) -> Tensor:
    """Give ``norm`` the weights of ``other``; what that made ``made`` (N, T, d) of, up to its scale."""
    weights = other.state_dict()
    norm.load_state_dict(weights)
    gain, offset = weights["weight"].to(made.device).float(), weights.get("bias", torch.zeros(())).to(made.device)
    given: Tensor = (made.float() - offset.float()) * gain / (gain**2 + NO_GAIN)
    return given


def _spread(states: Tensor) -> Tensor:
    """The mean deviation within states (N, T, d), the first positions left out."""
    return states[:, SINKS:].float().std(-1).mean()


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
        raise InvalidInput("the layer's MLP has no output matrix to fold into; use student_init='copy'")
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
def ending_norm(student: LanguageModel, layer: nn.Module, row: Tensor) -> str:
    """The name of the norm whose output is the layer's; empty if it ends in a sum."""
    made: dict[str, Tensor] = {}

    def noted(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: made.update({name: output})

    whole: list[Tensor] = []
    with ExitStack() as hooks, suppress(Enough):
        for name, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.shape == (student.hidden_size,):
                hooks.callback(module.register_forward_hook(noted(name)).remove)
        hooks.callback(layer.register_forward_hook(_ends_with(whole)).remove)
        student.hidden(row)
    same = [name for name, each in made.items() if torch.equal(each.reshape(whole[0].shape), whole[0])]
    return same[-1] if same else ""


@torch.no_grad()
def _check_adds(student: LanguageModel, layer: nn.Module, matrix: nn.Module, norm: str, row: Tensor) -> None:
    """What the layer ends in must be "residual + what the matrix gives": doubling the one adds it to the other."""
    seen: list[Tensor] = []
    watch = layer.get_submodule(norm).register_forward_pre_hook(lambda _, given: seen.append(given[0].float()))

    def summed() -> tuple[Tensor, Tensor]:
        output, made = _output_of(student, layer, matrix, row)
        return (seen[-1] if norm else output), made

    output, made = summed()
    doubled = matrix.register_forward_hook(lambda _, __, value: 2 * value)
    try:
        output_of_double, _ = summed()
    finally:
        watch.remove()
        doubled.remove()
    if not torch.allclose(output_of_double - output, made, rtol=1e-2, atol=1e-3 * float(made.abs().max())):
        raise InvalidInput(
            f"a layer of this {student.architecture} model isn't its residual plus its MLP's output, so nothing can be "
            "folded into it; use student_init='copy'"
        )


def _output_of(model: LanguageModel, layer: nn.Module, matrix: nn.Module, row: Tensor) -> tuple[Tensor, Tensor]:
    """(output of the layer, output of its MLP), (1, T, d) each; later layers aren't run."""
    caught: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        caught.append(output)

    with ExitStack() as hooks, suppress(Enough):
        hooks.callback(matrix.register_forward_hook(note).remove)
        hooks.callback(layer.register_forward_hook(_ends_with(caught)).remove)
        model.hidden(row)
    made, output = caught
    return output.float(), made.float()


def _ends_with(caught: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps a layer's output and ends the pass."""

    def catch(_: nn.Module, __: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise Enough

    return catch


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


STUDENT_INITS: dict[str, Callable[[LanguageModel, Sequence[int], TargetStates], None]] = {
    "copy": lambda student, kept, states: None,
    "least_squares": least_squares,
}
"""How a copied student is prepared, by name. A better start is a new entry here."""
