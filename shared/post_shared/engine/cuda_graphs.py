"""Passes through a model that are captured once as CUDA graphs and then replayed.

A step that trains a prompt launches thousands of small kernels, and on a GPU the launches, not the arithmetic, decide
its time. A CUDA graph launches them all at once. It is captured for one shape and uses the same memory each time. So
shapes are kept few (:data:`TOKENS`), and while a pass waits for its backward pass, other passes run eagerly.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from post_shared.engine.backbone import Backbone

log = logging.getLogger("post.cuda_graphs")
TOKENS = 16
"""Texts are padded to a multiple of this."""
EAGER_RUNS = 1
"""How often a shape runs eagerly before it is captured, which takes about as long as four steps."""
MAX_GRAPHS = 32
"""Limit on captured shapes. More occur only where memory limits the micro-batches, and steps are long then."""
Run = Callable[..., Tensor]
"""``run(prompt, *others)`` -> hidden states. It only launches kernels, none of which depends on a tensor's values."""


class CapturedPass(Protocol):
    """A captured pass: hidden states from a prompt and other tensors, and the prompt's gradient from theirs."""

    def forward(self, prompt: Tensor, others: Sequence[Tensor]) -> Tensor: ...
    def backward(self, gradient: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CapturePool:
    """Memory ``handle`` and ``stream`` in which all passes of a model are captured, so that they reuse one pool."""

    handle: Any
    stream: torch.cuda.Stream

    @classmethod
    def on(cls, device: torch.device) -> CapturePool:
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class CudaPass:
    """Two CUDA graphs, forward and backward. The passes of a pool share its memory: one is in progress at a time."""

    def __init__(self, run: Run, prompt: Tensor, others: Sequence[Tensor], pool: CapturePool | None) -> None:
        assert pool is not None
        self.run = run  # keeps the other tensors that it reads alive
        self.prompt = prompt.detach().clone().requires_grad_()
        self.others = [tensor.to(prompt.device, copy=True) for tensor in others]
        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.device(prompt.device), torch.enable_grad():
            self._capture(pool)

    def _capture(self, pool: CapturePool) -> None:
        current = torch.cuda.current_stream()
        pool.stream.wait_stream(current)
        with torch.cuda.stream(pool.stream):  # libraries allocate their workspaces now, not during capture
            self.run(self.prompt, *self.others).sum().backward()  # type: ignore[no-untyped-call]
        current.wait_stream(pool.stream)
        self.prompt.grad = None
        with torch.cuda.graph(self._forward_graph, pool=pool.handle, stream=pool.stream):
            self.hidden = self.run(self.prompt, *self.others)
        self.hidden_gradient = torch.zeros_like(self.hidden)
        with torch.cuda.graph(self._backward_graph, pool=pool.handle, stream=pool.stream):
            (self.gradient,) = torch.autograd.grad(self.hidden, self.prompt, self.hidden_gradient)
        self.hidden = self.hidden.detach()

    def forward(self, prompt: Tensor, others: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            self.prompt.copy_(prompt)
        for own, new in zip(self.others, others, strict=True):
            own.copy_(new)
        self._forward_graph.replay()
        return self.hidden.clone()

    def backward(self, gradient: Tensor) -> Tensor:
        self.hidden_gradient.copy_(gradient)
        self._backward_graph.replay()
        return self.gradient.clone()


class _Pending:
    """A forward pass whose backward pass may still follow."""


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, prompt: Tensor, graphs: CudaGraphs, captured: CapturedPass, others: Sequence[Tensor]
    ) -> Tensor:
        ctx.graphs, ctx.captured, ctx.pending = graphs, captured, _Pending()
        graphs.pending = weakref.ref(ctx.pending)  # ends with the backward pass, or when autograd frees it
        return captured.forward(prompt, others)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if ctx.graphs.pending is None or ctx.graphs.pending() is not ctx.pending:
            raise RuntimeError("a replayed pass has one backward pass: its saved tensors were freed or overwritten")
        ctx.graphs.pending = None
        return ctx.captured.backward(gradients[0]), None, None, None


class CudaGraphs:
    """The passes of one model, by the shapes of their inputs."""

    def __init__(
        self, capture: Callable[[Run, Tensor, Sequence[Tensor], CapturePool | None], CapturedPass] = CudaPass
    ) -> None:
        self.capture = capture
        self.made: dict[tuple[Any, ...], CapturedPass] = {}
        self.pending: weakref.ref[_Pending] | None = None
        """The pass that waits for its backward pass, if there is one."""
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._pool: CapturePool | None = None
        self._refused = False

    def __call__(self, run: Run, prompt: Tensor, *others: Tensor) -> Tensor:
        """The result of ``run(prompt, *others)``: eager, captured, or replayed.

        Without gradients nothing is captured, but a captured shape is replayed."""
        shape = tuple((tensor.shape, tensor.dtype) for tensor in (prompt, *others))
        differentiated = torch.is_grad_enabled() and prompt.requires_grad
        pending = self.pending is not None and self.pending() is not None
        if differentiated and not pending:
            self._capture_if_known(shape, run, prompt, others)
        if pending or shape not in self.made:
            return self._eagerly(run, prompt, others)
        if differentiated:
            return _Replayed.apply(prompt, self, self.made[shape], others)  # type: ignore[no-any-return,no-untyped-call]
        return self.made[shape].forward(prompt, others)

    def _capture_if_known(self, shape: tuple[Any, ...], run: Run, prompt: Tensor, others: Sequence[Tensor]) -> None:
        """Capture a shape that was seen before. The first failure (an operation, or memory) ends capturing for good."""
        self._seen[shape] += 1
        if self._refused or self._seen[shape] <= EAGER_RUNS or shape in self.made or len(self.made) == MAX_GRAPHS:
            return
        if self._pool is None and prompt.is_cuda:
            self._pool = CapturePool.on(prompt.device)
        try:
            self.made[shape] = self.capture(run, prompt, others, self._pool)
        except RuntimeError as error:
            if prompt.is_cuda:
                _renew_generator(prompt.device)
            self._refuse(error)

    def _eagerly(self, run: Run, prompt: Tensor, others: Sequence[Tensor]) -> Tensor:
        """If memory runs out, free the captured passes and try again."""
        try:
            return run(prompt, *others)
        except torch.OutOfMemoryError as error:
            if not self.made:
                raise
            self._refuse(error)
        return run(prompt, *others)

    def _refuse(self, error: RuntimeError) -> None:
        log.warning("passes aren't recorded, which costs time: %s", error)
        self.made.clear()
        self._refused = True


def _renew_generator(device: torch.device) -> None:
    """A failed capture leaves the GPU's random generator waiting for its end: continue its sequence in a new state."""
    old = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    new = torch.Generator(device).manual_seed(old.initial_seed())
    new.set_offset(old.get_offset())
    old.graphsafe_set_state(new.graphsafe_get_state())


def can_capture(model: Backbone) -> bool:
    """Whether one GPU holds the whole model, and no hook moves its weights."""
    on_gpu = model.device.type == "cuda" and len(model.devices) == 1
    return on_gpu and not hasattr(model.model, "hf_device_map")


def up_to(count: int, multiple: int) -> int:
    """``count``, rounded up to a multiple.

    >>> up_to(33, 16)
    48
    """
    return -(-count // multiple) * multiple
