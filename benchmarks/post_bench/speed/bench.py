"""What every part works on, and how two ways of one thing are timed."""

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
"""What one step is made on: a batch, or the number of a step."""
WARM = {"cpu": 0, "cuda": 2}
"""Steps of each way on each case that aren't timed: on a GPU a shape is recorded when it comes again."""
Way = Callable[[Case], float | None]
"""One step. A way with work around it that isn't to be counted returns its own seconds."""


@dataclass(frozen=True)
class Bench:
    """Models, rows and sizes. ``private`` are the owner's rows, ``public`` the provider's texts."""

    target: LanguageModel
    student: LanguageModel
    task: Task
    private: Sequence[Row]
    public: Sequence[str]
    corpus: Sequence[str]
    length: int = 20
    """Vectors of the prompt."""
    max_length: int = 128
    batch_size: int | None = None
    """Instead of each part's own default."""
    teacher: LanguageModel | None = None
    """The target as a worker loads it to distil or transfer, where that is in another type."""
    learner: LanguageModel | None = None
    """The student as an owner loads it to tune without privacy, where that is in another type."""

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
        """As the training loops draw them: a function of the step."""
        return ShuffledBatches(encoded, self.batch_size or size, seed=0)

    def prompt(self, model: LanguageModel) -> Tensor:
        """(l, d), where tuning starts."""
        return starting_prompt(model, self.task, TuneOptions(num_virtual_tokens=self.length)).embeddings.clone()


@dataclass(frozen=True)
class Timing:
    """One way of doing a part. ``flop`` is None where the algorithm isn't ours to count."""

    seconds: float
    """Median of a step."""
    flop: float | None
    """Operations that a step needs, mean over the rounds."""
    share: float | None
    """Of the matrix rate; median over the rounds."""
    tokens_per_second: float
    peak_bytes: int
    """Above what the process held before the step."""


@dataclass(frozen=True)
class Part:
    """All ways of one part; ``ratios`` say how many times longer each other way takes than the first."""

    ways: dict[str, Timing]
    ratios: dict[str, float]
    matrix_rate: float


def tokens_of(batch: Batch) -> int:
    """Tokens of the rows, without padding and prompts."""
    return int(sum(len(batch.encoded.rows[at].token_ids) for at in batch.index))


def fresh(batch: Batch) -> Batch:
    """The same rows: no way profits from what another one's batch has kept."""
    return Batch(batch.encoded, batch.index)


def steps(
    model: LanguageModel, optimizer: PromptOptimizer, loss: Loss, graphs: CudaGraphs | None
) -> Callable[[Batch], None]:
    """The optimizer's step, its passes replayed from ``graphs``."""

    def step(batch: Batch) -> None:
        with model.replaying(graphs):
            optimizer.update(loss, fresh(batch))

    return step


@dataclass
class _Seen:
    """What the rounds have shown."""

    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    rates: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def timing(self, name: str, *, counted: bool) -> Timing:
        each = self.seconds[name]
        share = [f / s / r for f, s, r in zip(self.flops, each, self.rates, strict=True)]
        return Timing(
            statistics.median(each),
            statistics.mean(self.flops) if counted else None,
            statistics.median(share) if counted else None,
            statistics.median(n / s for n, s in zip(self.tokens, each, strict=True)),
            self.peaks[name],
        )

    def ratio(self, name: str, first: str) -> float:
        pairs = zip(self.seconds[first], self.seconds[name], strict=True)
        return statistics.median(other / ours for ours, other in pairs)


@dataclass(frozen=True)
class Race(Generic[Case]):
    """Ways of making the same step, POST's first, and the cases that they are timed on."""

    ways: Mapping[str, Way[Case]]
    cases: Callable[[int], Case]
    flop: Callable[[Case], float]
    """What a step of POST's way needs."""
    tokens: Callable[[Case], int]

    def alone(self) -> Race[Case]:
        """POST's way without the others."""
        name, way = next(iter(self.ways.items()))
        return replace(self, ways={name: way})

    def run(self, rounds: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Part:
        """Time all ways on the same case, round by round, with the matrix rate in ``dtype`` between them.

        The first round warms up and isn't timed, but its memory counts: allocators keep what they have got.
        """
        found = _Seen({name: [] for name in self.ways}, dict.fromkeys(self.ways, 0))
        for turn in range(rounds + 1):
            case = self.cases(turn)
            before = matrix_rate(device, dtype)
            for name, way in list(self.ways.items())[:: 1 if turn % 2 else -1]:
                for _ in range(WARM[device.type]):
                    way(case)
                with Peak(device) as peak:
                    took = _seconds(way, case, device)
                found.peaks[name] = max(found.peaks[name], peak.bytes)
                if turn:
                    found.seconds[name].append(took)
            if turn:
                found.rates.append((before + matrix_rate(device, dtype)) / 2)
                found.tokens.append(self.tokens(case))
                found.flops.append(self.flop(case))
        first = next(iter(self.ways))
        timings = {name: found.timing(name, counted=name == first) for name in self.ways}
        ratios = {name: found.ratio(name, first) for name in self.ways if name != first}
        return Part(timings, ratios, statistics.median(found.rates))


def _seconds(way: Way[Case], case: Case, device: torch.device) -> float:
    began = time.perf_counter()
    own = way(case)
    finish(device)
    return time.perf_counter() - began if own is None else own
