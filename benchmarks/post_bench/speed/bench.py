"""The inputs of all parts, and the timing of several implementations of one step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from post_bench.speed.machine import Peak, finish, matrix_rate
from post_shared.data.batches import Batch, EncodedRows, ShuffledBatches
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.cuda_graphs import CudaGraphs
from post_shared.method.tuning.tune import starting_prompt
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.optimizer import Loss, PromptOptimizer

Case = TypeVar("Case")
"""The input of one step: a batch, or the step's number."""
WARM_UP_STEPS = {"cpu": 0, "cuda": 2}
"""Untimed steps on each case: on a GPU, a shape is captured as a CUDA graph when it recurs."""
Step = Callable[[Case], float | None]
"""One step. It may return its own seconds, if part of its work must not be counted."""


@dataclass(frozen=True)
class Bench:
    """Models, rows and sizes. ``private`` has the owner's rows, ``public`` the provider's texts."""

    target: LanguageModel
    student: LanguageModel
    task: Task
    private: Sequence[Row]
    public: Sequence[str]
    corpus: Sequence[str]
    length: int = 20
    """Prompt vectors."""
    max_length: int = 128
    batch_size: int | None = None
    """Replaces each part's own default."""
    teacher: LanguageModel | None = None
    """The target as a worker loads it to distil or transfer, if its dtype differs."""
    learner: LanguageModel | None = None
    """The student as an owner loads it to tune without privacy, if its dtype differs."""

    @property
    def device(self) -> torch.device:
        return self.target.device

    @cached_property
    def private_rows(self) -> EncodedRows:
        labels = [row.label for row in self.private]
        texts = [row.text for row in self.private]
        return encode_rows(self.student, self.task, texts, self.max_length, labels=labels, reserved=self.length)

    @cached_property
    def public_rows(self) -> EncodedRows:
        return encode_rows(self.target, self.task, self.public, self.max_length, reserved=self.length)

    def batches(self, encoded: EncodedRows, size: int) -> Callable[[int], Batch]:
        """Batches as in the training loops, by step."""
        return ShuffledBatches(encoded, self.batch_size or size, seed=0)

    def prompt(self, model: LanguageModel) -> Tensor:
        """(l, d): the initial prompt of tuning."""
        return starting_prompt(model, self.task, TuneOptions(num_virtual_tokens=self.length)).embeddings.clone()


@dataclass(frozen=True)
class Timing:
    """The timing of one implementation. ``flop`` is None for references."""

    seconds: float
    """Median per step."""
    flop: float | None
    """Operations that a step needs: the mean over the rounds."""
    share: float | None
    """Share of the matrix rate: the median over the rounds."""
    tokens_per_second: float
    peak_bytes: int
    """Peak memory of a step above the memory before it."""


@dataclass(frozen=True)
class Part:
    """The timings of one part; ``ratios`` has each other implementation's time over that of the first."""

    ways: dict[str, Timing]
    ratios: dict[str, float]
    matrix_rate: float


def tokens_of(batch: Batch) -> int:
    """Tokens of the rows, without padding and prompts."""
    return int(sum(len(batch.encoded.rows[row].token_ids) for row in batch.index))


def fresh(batch: Batch) -> Batch:
    """A batch of the same rows without cached tensors, so that no step profits from another's."""
    return Batch(batch.encoded, batch.index)


def steps(
    model: LanguageModel, optimizer: PromptOptimizer, loss: Loss, graphs: CudaGraphs | None
) -> Callable[[Batch], None]:
    """The optimizer's step, with passes replayed from ``graphs``, if any."""

    def step(batch: Batch) -> None:
        with model.using_graphs(graphs):
            optimizer.update(loss, fresh(batch))

    return step


@dataclass
class _Measurements:
    """The measurements of all rounds."""

    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    rates: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def timing(self, name: str, *, counted: bool) -> Timing:
        seconds = self.seconds[name]
        shares = [f / s / r for f, s, r in zip(self.flops, seconds, self.rates, strict=True)]
        return Timing(
            statistics.median(seconds),
            statistics.mean(self.flops) if counted else None,
            statistics.median(shares) if counted else None,
            statistics.median(n / s for n, s in zip(self.tokens, seconds, strict=True)),
            self.peaks[name],
        )

    def ratio(self, name: str, first: str) -> float:
        pairs = zip(self.seconds[first], self.seconds[name], strict=True)
        return statistics.median(other / ours for ours, other in pairs)


@dataclass(frozen=True)
class Race(Generic[Case]):
    """Implementations of the same step, POST's first, and the cases on which they are timed."""

    ways: Mapping[str, Step[Case]]
    cases: Callable[[int], Case]
    flop: Callable[[Case], float]
    """Operations that POST's step needs."""
    tokens: Callable[[Case], int]

    def alone(self) -> Race[Case]:
        """POST's implementation without the references."""
        name, step = next(iter(self.ways.items()))
        return replace(self, ways={name: step})

    def run(self, rounds: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Part:
        """Time all implementations on the same case, round by round, and the matrix rate in ``dtype`` in between.

        The first round is an untimed warm-up, but its memory counts, because allocators don't return memory.
        """
        measured = _Measurements({name: [] for name in self.ways}, dict.fromkeys(self.ways, 0))
        for turn in range(rounds + 1):
            case = self.cases(turn)
            before = matrix_rate(device, dtype)
            for name, step in list(self.ways.items())[:: 1 if turn % 2 else -1]:
                for _ in range(WARM_UP_STEPS[device.type]):
                    step(case)
                with Peak(device) as peak:
                    seconds = _seconds(step, case, device)
                measured.peaks[name] = max(measured.peaks[name], peak.bytes)
                if turn:
                    measured.seconds[name].append(seconds)
            if turn:
                measured.rates.append((before + matrix_rate(device, dtype)) / 2)
                measured.tokens.append(self.tokens(case))
                measured.flops.append(self.flop(case))
        first = next(iter(self.ways))
        timings = {name: measured.timing(name, counted=name == first) for name in self.ways}
        ratios = {name: measured.ratio(name, first) for name in self.ways if name != first}
        return Part(timings, ratios, statistics.median(measured.rates))


def _seconds(step: Step[Case], case: Case, device: torch.device) -> float:
    began = time.perf_counter()
    own = step(case)
    finish(device)
    return time.perf_counter() - began if own is None else own
