"""Each classic DP-SGD mistake, injected in turn, makes its check fail; the real code passes all checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from post_client.privacy import PoissonSampler, PromptDPSGD, SeededRandomness
from post_client.privacy.dp_optimizer import RowGradient
from post_client.tuning.tune import tuning_objective
from post_shared.data.batches import Batch, EncodedRows
from post_shared.data.tasks import Task
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.training.optimizer import Loss
from tests.models import LABELS, TEXTS, tiny_model

TASK = Task("{text}, it was", {"positive": ("good", "great"), "negative": ("bad", "terrible")})
CLIP, SIGMA, EXPECTED = 1e-4, 0.7, 16.0


@cache
def setting() -> tuple[LanguageModel, EncodedRows, Loss]:
    model = tiny_model(layers=1)
    return model, encode_rows(model, TASK, TEXTS * 2, labels=LABELS * 2), tuning_objective(model, TASK)


@dataclass(frozen=True)
class Engine:
    """The parts of a private step: the optimizer and the batch sampler."""

    optimizer: type[PromptDPSGD] = PromptDPSGD
    sampler: type[PoissonSampler] = PoissonSampler

    def new_optimizer(self, *, noise: float = 0.0) -> PromptDPSGD:
        start = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        return self.optimizer(
            nn.Parameter(start), 0.01, noise_multiplier=noise, max_grad_norm=CLIP, expected_batch_size=EXPECTED,
            randomness=SeededRandomness(3),
        )  # fmt: skip

    def gradient(self, rows: list[int], *, noise: float = 0.0) -> Tensor:
        """The gradient that Adam receives for a batch, times the expected batch size."""
        optimizer = self.new_optimizer(noise=noise)
        optimizer.update(setting()[2], setting()[1].batch(rows))
        gradient: Tensor = optimizer.master.grad
        return torch.zeros(3, 32, dtype=torch.float64) if gradient is None else gradient * EXPECTED


# --- the checks ---------------------------------------------------------------------------------------


def noise_has_its_deviation(engine: Engine) -> None:
    optimizer, samples = engine.new_optimizer(noise=SIGMA), []
    for _ in range(60):
        optimizer.update(setting()[2], setting()[1].batch([0]))
        samples.append(optimizer.master.grad * EXPECTED - optimizer.summed_gradient)
    noise = torch.stack(samples)
    assert abs(float(noise.std()) / (SIGMA * CLIP) - 1) < 5 / np.sqrt(2 * noise.numel())


def one_row_moves_the_sum_by_at_most_c(engine: Engine) -> None:
    for rows in ([0], [0, 1, 2, 3], list(range(12))):
        for more in (13, 14, 15):
            moved = engine.gradient([*rows, more]) - engine.gradient(rows)
            assert float(moved.norm()) <= CLIP * (1 + 1e-6)


def row_gradients_are_those_of_single_rows(engine: Engine) -> None:
    together = engine.gradient([0, 1, 2, 3])
    alone = sum((engine.gradient([row]) for row in range(4)), torch.zeros(3, 32, dtype=torch.float64))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=CLIP * 1e-9)


def batches_have_the_binomials_sizes(engine: Engine) -> None:
    examples, rate, steps = 200, 0.05, 400
    sampler = engine.sampler(examples, rate, SeededRandomness(1))
    sizes = np.array([len(sampler.draw(step)) for step in range(steps)])
    variance = examples * rate * (1 - rate)
    assert abs(sizes.mean() - examples * rate) < 5 * np.sqrt(variance / steps)
    assert abs(sizes.var() / variance - 1) < 5 * np.sqrt(2 / steps)


def an_empty_batch_is_a_noisy_step(engine: Engine) -> None:
    optimizer = engine.new_optimizer(noise=SIGMA)
    before = optimizer.prompt.detach().clone()
    optimizer.update(setting()[2], setting()[1].batch([]))
    assert int(optimizer.state()["steps_done"]) == 1
    assert float((optimizer.prompt.detach() - before).abs().min()) > 0


def sums_are_divided_by_the_expected_size(engine: Engine) -> None:
    for rows in ([0], [0, 1, 2, 3, 4]):
        optimizer = engine.new_optimizer()
        optimizer.update(setting()[2], setting()[1].batch(rows))
        torch.testing.assert_close(optimizer.master.grad, optimizer.summed_gradient / EXPECTED)


CHECKS: tuple[Callable[[Engine], None], ...] = (
    noise_has_its_deviation,
    one_row_moves_the_sum_by_at_most_c,
    row_gradients_are_those_of_single_rows,
    batches_have_the_binomials_sizes,
    an_empty_batch_is_a_noisy_step,
    sums_are_divided_by_the_expected_size,
)

# --- the mistakes -------------------------------------------------------------------------------------


class HalfTheNoise(PromptDPSGD):
    def add_noise(self) -> None:
        self.optimizer.noise_multiplier *= 0.5
        super().add_noise()
        self.optimizer.noise_multiplier /= 0.5


class ClipAfterAveraging(PromptDPSGD):
    """The mean over a micro-batch is clipped, instead of each row, and added once per row."""

    def clip_and_accumulate(self, gradients: Tensor) -> None:
        mean = gradients.mean(0, keepdim=True)
        for _ in range(len(gradients)):
            super().clip_and_accumulate(mean)


class OneSharedRow(PromptDPSGD):
    """As Opacus's hooks treat PEFT's prompt: one gradient row for all rows of a forward pass."""

    def row_gradients(self, loss: Loss, batch: Batch) -> Iterator[RowGradient]:
        computed = list(super().row_gradients(loss, batch))
        if computed:
            yield computed[0]._replace(gradient=torch.stack([each.gradient for each in computed]).sum(0))


class EmptyBatchSkipped(PromptDPSGD):
    def update(self, loss: Loss, batch: Batch) -> float | None:
        return super().update(loss, batch) if len(batch) else None


class DividedByTheRealSize(PromptDPSGD):
    def accumulate(self, loss: Loss, batch: Batch) -> Iterator[Tensor]:
        self.optimizer.expected_batch_size = max(1, len(batch))
        return super().accumulate(loss, batch)


class ShuffledBatches(PoissonSampler):
    """Batches of a fixed size from a shuffled list."""

    def draw(self, step: int) -> np.ndarray:  # type: ignore[type-arg]
        size = round(self.examples * self.rate)
        per_epoch = self.examples // size
        order = np.random.default_rng(step // per_epoch).permutation(self.examples)
        return np.sort(order[(step % per_epoch) * size :][:size])


MISTAKES = {
    HalfTheNoise: noise_has_its_deviation,
    ClipAfterAveraging: row_gradients_are_those_of_single_rows,
    OneSharedRow: one_row_moves_the_sum_by_at_most_c,
    EmptyBatchSkipped: an_empty_batch_is_a_noisy_step,
    DividedByTheRealSize: sums_are_divided_by_the_expected_size,
    ShuffledBatches: batches_have_the_binomials_sizes,
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_real_engine_passes(check: Callable[[Engine], None]) -> None:
    check(Engine())


@pytest.mark.parametrize(("mistake", "check"), MISTAKES.items(), ids=lambda each: each.__name__)
def test_each_mistake_is_found_by_its_check(mistake: type, check: Callable[[Engine], None]) -> None:
    kind = "sampler" if issubclass(mistake, PoissonSampler) else "optimizer"
    with pytest.raises(AssertionError):
        check(Engine(**{kind: mistake}))


def test_clipping_after_averaging_lets_one_row_move_the_sum_by_more_than_c() -> None:
    with pytest.raises(AssertionError):
        one_row_moves_the_sum_by_at_most_c(Engine(optimizer=ClipAfterAveraging))
