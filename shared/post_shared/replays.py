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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from post_shared.language_model import LanguageModel

log = logging.getLogger("post.replays")
TOKENS = 16
"""To a multiple of these, texts are padded."""
MEETINGS = 1
"""How often a shape is run as it is before it is recorded, which takes about as long as four steps."""
MOST = 32
"""Shapes that are recorded; more come only where parts are cut by memory, and a step is long then."""
Run = Callable[..., Tensor]
"""``run(prompt, *others)``: hidden states, and kernels alone, none of which depends on what a tensor holds."""


class Pass(Protocol):
    """A recorded pass: hidden states from a prompt and other tensors, and the prompt's gradient from theirs."""

    def forth(self, prompt: Tensor, others: Sequence[Tensor]) -> Tensor: ...
    def back(self, gradient: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Studio:
    """Where all passes of a recorder are recorded: one ``stream`` takes again what it gave back to ``pool``."""

    pool: Any
    stream: torch.cuda.Stream

    @classmethod
    def on(cls, device: torch.device) -> Studio:
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class CudaPass:
    """Two CUDA graphs, one for each way, in memory that the passes of a studio share: one is under way at a time."""

    def __init__(self, run: Run, prompt: Tensor, others: Sequence[Tensor], studio: Studio | None) -> None:
        assert studio is not None
        self.run = run  # with the tensors that it reads besides
        self.prompt = prompt.detach().clone().requires_grad_()
        self.others = [each.to(prompt.device, copy=True) for each in others]
        self._forth, self._back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.device(prompt.device), torch.enable_grad():
            self._record(studio)

    def _record(self, studio: Studio) -> None:
        here = torch.cuda.current_stream()
        studio.stream.wait_stream(here)
        with torch.cuda.stream(studio.stream):  # libraries make their workspaces now, not while recording
            self.run(self.prompt, *self.others).sum().backward()  # type: ignore[no-untyped-call]
        here.wait_stream(studio.stream)
        self.prompt.grad = None
        with torch.cuda.graph(self._forth, pool=studio.pool, stream=studio.stream):
            self.hidden = self.run(self.prompt, *self.others)
        self.above = torch.zeros_like(self.hidden)
        with torch.cuda.graph(self._back, pool=studio.pool, stream=studio.stream):
            (self.gradient,) = torch.autograd.grad(self.hidden, self.prompt, self.above)
        self.hidden = self.hidden.detach()

    def forth(self, prompt: Tensor, others: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            self.prompt.copy_(prompt)
        for mine, given in zip(self.others, others, strict=True):
            mine.copy_(given)
        self._forth.replay()
        return self.hidden.clone()

    def back(self, gradient: Tensor) -> Tensor:
        self.above.copy_(gradient)
        self._back.replay()
        return self.gradient.clone()


class _Way:
    """One pass forth whose way back may be to come."""


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prompt: Tensor, recorder: Recorder, made: Pass, others: Sequence[Tensor]) -> Tensor:
        ctx.recorder, ctx.made, ctx.way = recorder, made, _Way()
        recorder.open = weakref.ref(ctx.way)  # closed by the way back, or when nobody can go it any more
        return made.forth(prompt, others)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if ctx.recorder.open is None or ctx.recorder.open() is not ctx.way:
            raise RuntimeError("a replayed pass can be gone back through once: what it keeps is gone")
        ctx.recorder.open = None
        return ctx.made.back(gradients[0]), None, None, None


class Recorder:
    """The passes of one model, by the shapes of what goes in."""

    def __init__(self, record: Callable[[Run, Tensor, Sequence[Tensor], Studio | None], Pass] = CudaPass) -> None:
        self.record = record
        self.made: dict[tuple[Any, ...], Pass] = {}
        self.open: weakref.ref[_Way] | None = None
        """The pass whose way back is to come, if there is one."""
        self._met: Counter[tuple[Any, ...]] = Counter()
        self._studio: Studio | None = None
        self._refused = False

    def __call__(self, run: Run, prompt: Tensor, *others: Tensor) -> Tensor:
        """What ``run(prompt, *others)`` gives: run as it is, recorded, or replayed.

        Without gradients nothing is recorded, but what is there is replayed."""
        shape = tuple((each.shape, each.dtype) for each in (prompt, *others))
        back = torch.is_grad_enabled() and prompt.requires_grad
        under_way = self.open is not None and self.open() is not None
        if back and not under_way:
            self._meet(shape, run, prompt, others)
        if under_way or shape not in self.made:
            return self._as_it_is(run, prompt, others)
        if back:
            return _Replayed.apply(prompt, self, self.made[shape], others)  # type: ignore[no-any-return,no-untyped-call]
        return self.made[shape].forth(prompt, others)

    def _meet(self, shape: tuple[Any, ...], run: Run, prompt: Tensor, others: Sequence[Tensor]) -> None:
        """Record a shape that comes again; a model that can't be, or no memory for it, ends the recording of all."""
        self._met[shape] += 1
        if self._refused or self._met[shape] <= MEETINGS or shape in self.made or len(self.made) == MOST:
            return
        if self._studio is None and prompt.is_cuda:
            self._studio = Studio.on(prompt.device)
        try:
            self.made[shape] = self.record(run, prompt, others, self._studio)
        except RuntimeError as error:
            if prompt.is_cuda:
                _renew_generator(prompt.device)
            self._refuse(error)

    def _as_it_is(self, run: Run, prompt: Tensor, others: Sequence[Tensor]) -> Tensor:
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


_now: ContextVar[tuple[LanguageModel, Recorder] | None] = ContextVar("replays", default=None)


def recorder_now(model: LanguageModel) -> Recorder | None:
    """What records the passes of ``model`` now, if anything does."""
    now = _now.get()
    return now[1] if now and now[0] is model else None


@contextmanager
def replays(model: LanguageModel, recorder: Recorder | None) -> Iterator[None]:
    """While open, ``recorder`` replays the passes of one prompt through ``model``; None: they run as they are."""
    token = _now.set((model, recorder) if recorder else None)
    try:
        yield
    finally:
        _now.reset(token)


def recorder_of(model: LanguageModel) -> Recorder | None:
    """A new one where passes can be replayed: on a GPU that holds the whole model, with no hook that moves its weights,
    and where its family's attention can be told what to see."""
    on_gpu = model.device.type == "cuda" and len(model.devices) == 1 and not hasattr(model.model, "hf_device_map")
    return Recorder() if on_gpu and model.packs else None


def up_to(count: int, multiple: int) -> int:
    """The least multiple that is no less.

    >>> up_to(33, 16)
    48
    """
    return -(-count // multiple) * multiple
