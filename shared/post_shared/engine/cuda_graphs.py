"""Passes through a model that are recorded once as CUDA graphs and then replayed.

A step that trains a prompt is some thousands of small kernels: on a GPU the processor that launches them, not the
arithmetic, sets its time. A CUDA graph launches them all at once. It is made for one shape and reads and writes the
same memory each time, so shapes are made few (:data:`TOKENS`), and a pass whose way back is still to come keeps others
from being replayed meanwhile: they run as they are.
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
"""To a multiple of these, texts are padded."""
EAGER_RUNS = 1
"""How often a shape is run as it is before it is recorded, which takes about as long as four steps."""
MAX_GRAPHS = 32
"""Shapes that are recorded; more come only where parts are cut by memory, and a step is long then."""
Run = Callable[..., Tensor]
"""``run(prompt, *others)``: hidden states, and kernels alone, none of which depends on what a tensor holds."""


class CapturedPass(Protocol):
    """A recorded pass: hidden states from a prompt and other tensors, and the prompt's gradient from theirs."""

    def forward(self, prompt: Tensor, others: Sequence[Tensor]) -> Tensor: ...
    def backward(self, gradient: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CapturePool:
    """Where all passes of a graphs are recorded: one ``stream`` takes again what it gave back to ``pool``."""

    handle: Any
    stream: torch.cuda.Stream

    @classmethod
    def on(cls, device: torch.device) -> CapturePool:
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class CudaPass:
    """Two CUDA graphs, one for each way, in memory that the passes of a pool share: one is under way at a time."""

    def __init__(self, run: Run, prompt: Tensor, others: Sequence[Tensor], pool: CapturePool | None) -> None:
        assert pool is not None
        self.run = run  # with the tensors that it reads besides
        self.prompt = prompt.detach().clone().requires_grad_()
        self.others = [each.to(prompt.device, copy=True) for each in others]
        self._forth, self._back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.device(prompt.device), torch.enable_grad():
            self._record(pool)

    def _record(self, pool: CapturePool) -> None:
        here = torch.cuda.current_stream()
        pool.stream.wait_stream(here)
        with torch.cuda.stream(pool.stream):  # libraries make their workspaces now, not while recording
            self.run(self.prompt, *self.others).sum().backward()  # type: ignore[no-untyped-call]
        here.wait_stream(pool.stream)
        self.prompt.grad = None
        with torch.cuda.graph(self._forth, pool=pool.handle, stream=pool.stream):
            self.hidden = self.run(self.prompt, *self.others)
        self.above = torch.zeros_like(self.hidden)
        with torch.cuda.graph(self._back, pool=pool.handle, stream=pool.stream):
            (self.gradient,) = torch.autograd.grad(self.hidden, self.prompt, self.above)
        self.hidden = self.hidden.detach()

    def forward(self, prompt: Tensor, others: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            self.prompt.copy_(prompt)
        for mine, given in zip(self.others, others, strict=True):
            mine.copy_(given)
        self._forth.replay()
        return self.hidden.clone()

    def backward(self, gradient: Tensor) -> Tensor:
        self.above.copy_(gradient)
        self._back.replay()
        return self.gradient.clone()


class _Pending:
    """One pass forth whose way back may be to come."""


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prompt: Tensor, graphs: CudaGraphs, made: CapturedPass, others: Sequence[Tensor]) -> Tensor:
        ctx.graphs, ctx.made, ctx.pending = graphs, made, _Pending()
        graphs.pending = weakref.ref(ctx.pending)  # closed by the way back, or when nobody can go it any more
        return made.forward(prompt, others)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if ctx.graphs.pending is None or ctx.graphs.pending() is not ctx.pending:
            raise RuntimeError("a replayed pass can be gone back through once: what it keeps is gone")
        ctx.graphs.pending = None
        return ctx.made.backward(gradients[0]), None, None, None


class CudaGraphs:
    """The passes of one model, by the shapes of what goes in."""

    def __init__(
        self, capture: Callable[[Run, Tensor, Sequence[Tensor], CapturePool | None], CapturedPass] = CudaPass
    ) -> None:
        self.capture = capture
        self.made: dict[tuple[Any, ...], CapturedPass] = {}
        self.pending: weakref.ref[_Pending] | None = None
        """The pass whose way back is to come, if there is one."""
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._pool: CapturePool | None = None
        self._refused = False

    def __call__(self, run: Run, prompt: Tensor, *others: Tensor) -> Tensor:
        """What ``run(prompt, *others)`` gives: run as it is, recorded, or replayed.

        Without gradients nothing is recorded, but what is there is replayed."""
        shape = tuple((each.shape, each.dtype) for each in (prompt, *others))
        back = torch.is_grad_enabled() and prompt.requires_grad
        pending = self.pending is not None and self.pending() is not None
        if back and not pending:
            self._capture_if_known(shape, run, prompt, others)
        if pending or shape not in self.made:
            return self._eagerly(run, prompt, others)
        if back:
            return _Replayed.apply(prompt, self, self.made[shape], others)  # type: ignore[no-any-return,no-untyped-call]
        return self.made[shape].forward(prompt, others)

    def _capture_if_known(self, shape: tuple[Any, ...], run: Run, prompt: Tensor, others: Sequence[Tensor]) -> None:
        """Record a shape that comes again; a model that can't be, or no memory for it, ends the recording of all."""
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
        """What was recorded gives way where memory ends."""
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
    """A recording that broke off leaves the GPU's random numbers waiting for its end: go on with them elsewhere."""
    old = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    new = torch.Generator(device).manual_seed(old.initial_seed())
    new.set_offset(old.get_offset())
    old.graphsafe_set_state(new.graphsafe_get_state())


def can_capture(model: Backbone) -> bool:
    """Whether one GPU holds the whole model, and no hook moves its weights."""
    on_gpu = model.device.type == "cuda" and len(model.devices) == 1
    return on_gpu and not hasattr(model.model, "hf_device_map")


def up_to(count: int, multiple: int) -> int:
    """The least multiple that is no less.

    >>> up_to(33, 16)
    48
    """
    return -(-count // multiple) * multiple
