"""PromptDPSGD (Duan et al. 2023): differentially private tuning of a soft prompt, one step at a time.

Clipping bounds what a row adds to the sum of gradients only if the row's gradient is a function of that row, the prompt
and the student alone. A hostile student can make one bit of rounding decide the sign of a gradient, and a matrix
product rounds a row differently in a batch of three than in a batch of four. So every row runs alone, [prompt; text],
in a shape that follows from its own length: no other row enters its computation. What is left to the machine is that
the same numbers in the same shape give the same bits; deterministic kernels are demanded of it
(:func:`deterministic`), and ``python -m benchmarks.sensitivity`` measures it.

(Opacus's hooks on PEFT's prompt tuning are silently wrong: PEFT embeds one prompt and repeats the output, so the hooks
see one row for the whole batch.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from post_client.privacy.noise import gaussian
from post_client.privacy.randomness import Randomness
from post_shared.data.batches import Batch
from post_shared.errors import InvalidInput
from post_shared.training.optimizer import Loss, load_optimizer_state, optimizer_state, set_learning_rate

ROWS = 64
"""Gradients that wait to be clipped together. Memory depends on it, the result doesn't."""
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic, and reads it once


class RowGradient(NamedTuple):
    """Of one row, by its number: loss () and gradient (l, d)."""

    row: int
    loss: Tensor
    gradient: Tensor


class Canaries(Protocol):
    """Gradients that an auditor adds to the sums of private steps, and its view of what comes out (white box)."""

    def gradients(self, step: int) -> Tensor:
        """(G, l, d): clipped and added like those of G more rows."""
        ...

    def observe(self, noisy: Tensor) -> None:
        """The noisy sum (l, d) less that of the real rows, after every step: the proof lets the auditor know every
        other row and when it was sampled."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What the auditor has gathered: it is kept with the run, and filled again in place."""
        ...


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus has no types
    """Opacus's optimizer with another source of noise; clipping, summing and scaling are Opacus's own."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, randomness: Randomness, **settings: float) -> None:
        super().__init__(optimizer, **settings)
        self.randomness = randomness
        self.steps_done = 0

    def add_noise(self) -> None:
        """``p.grad = summed gradients + N(0, (noise multiplier * clipping norm)²)``, in the parameter's float64."""
        for p in self.params:
            noise = gaussian(
                self.randomness, tuple(p.shape), self.noise_multiplier * self.max_grad_norm, self.steps_done
            )
            p.grad = p.summed_grad + torch.from_numpy(noise).to(p.device, p.dtype)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within it, kernels on ``device`` give the same bits for the same input; those that can't raise an error.

    Of the attention kernels the plain one runs: the fused ones add up gradients in the order in which blocks end.
    """
    if device.type != "cuda":  # kernels on a CPU have a fixed order of summation
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


class PromptDPSGD:
    """Adam on a prompt (l, d), with every step differentially private with respect to one row.

    Args:
        prompt: the float32 prompt that the loss sees; updated in place after every step.
        noise_multiplier: σ. The noise has standard deviation σ times ``max_grad_norm``; the guarantee follows from
            σ, the sampling rate and the number of steps, and holds only if batches are Poisson-sampled.
        max_grad_norm: c. No row moves the sum of gradients by more than c.
        expected_batch_size: sampling rate times number of rows. Sums are divided by it, never by a batch's
            real size, which is a secret.
    """

    def __init__(
        self,
        prompt: nn.Parameter,
        learning_rate: float,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        randomness: Randomness,
    ) -> None:
        self.prompt = prompt
        self.canaries: Canaries | None = None
        """Set by an audit."""
        self.master: Any = nn.Parameter(prompt.detach().double())  # sums, noise and Adam live in float64
        self.optimizer = SecureDPOptimizer(
            torch.optim.Adam([self.master], lr=learning_rate),
            randomness=randomness,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )

    # --- the algorithm --------------------------------------------------------------------------------

    def update(self, loss: Loss, batch: Batch) -> float | None:
        """One step on a Poisson batch, however many rows it has; the mean loss, or None for an empty batch.

        An empty batch is a step like any other: the noise alone moves the prompt. A row whose loss isn't finite
        doesn't count in the mean, as its gradient doesn't in the sum: whether a run ends must not depend on one row.
        """
        self.begin()
        losses = list(self.accumulate(loss, batch))
        self.add_noise()
        self.divide_by_expected_batch_size()
        self.move()
        finite = [value for each in losses if bool((value := each.double()).isfinite())]
        return float(torch.stack(finite).mean()) if finite else None

    def begin(self) -> None:
        """A new step: the sum is zero."""
        self.optimizer.zero_grad()
        self.master.summed_grad = torch.zeros_like(self.master, requires_grad=False)

    def accumulate(self, loss: Loss, batch: Batch) -> Iterator[Tensor]:
        """Add the clipped gradients of a batch to the sum; yields the losses, () each."""
        waiting: list[Tensor] = []
        for _, value, gradient in self.row_gradients(loss, batch):
            waiting.append(gradient)
            yield value
            if len(waiting) == ROWS:
                self.clip_and_accumulate(torch.stack(waiting))
                waiting.clear()
        if waiting:
            self.clip_and_accumulate(torch.stack(waiting))

    def row_gradients(self, loss: Loss, batch: Batch) -> Iterator[RowGradient]:
        """The loss and the gradient of each row, which runs alone."""
        with deterministic(self.prompt.device):
            for at, row in enumerate(batch.index):
                leaf = self.prompt.detach().clone()[None].requires_grad_()  # (1, l, d)
                value = _one(loss(leaf, batch.part([at])))
                (gradient,) = torch.autograd.grad(value, leaf)
                yield RowGradient(row, value.detach(), gradient[0])

    def clip_and_accumulate(self, gradients: Tensor) -> None:
        """Scale each gradient, (B, l, d), to norm c at most and add it to the sum of this step.

        A gradient that isn't finite counts as 0: otherwise one row could turn the whole sum into NaN.
        """
        rows = gradients.double()
        finite = torch.isfinite(rows).flatten(1).all(dim=1)
        self.master.grad_sample = torch.where(finite[:, None, None], rows, 0.0)
        self.optimizer.clip_and_accumulate()
        self.master.grad_sample = None

    def add_noise(self) -> None:
        """Once per step, to the sum over all rows."""
        if self.canaries is None:
            self.optimizer.add_noise()
            return
        real_rows = self.summed_gradient.clone()
        added = self.canaries.gradients(self.optimizer.steps_done)
        if len(added):
            self.clip_and_accumulate(added.to(self.master.device))
        self.optimizer.add_noise()
        self.canaries.observe(self.master.grad.detach() - real_rows)

    def divide_by_expected_batch_size(self) -> None:
        self.master.grad_sample = self.master.new_zeros(0, *self.master.shape)
        self.optimizer.scale_grad()

    def move(self) -> None:
        """Adam's step on the noisy mean; the loss sees the new prompt."""
        self.optimizer.original_optimizer.step()
        self.optimizer.steps_done += 1
        with torch.no_grad():
            self.prompt.copy_(self.master)

    # --- around it ------------------------------------------------------------------------------------

    @property
    def summed_gradient(self) -> Tensor:
        """The clipped sum (l, d) of the step that was made last, before noise. Private: for tests and audits."""
        return self.master.summed_grad  # type: ignore[no-any-return]

    def set_learning_rate(self, learning_rate: float) -> None:
        set_learning_rate(self.optimizer.original_optimizer, learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as named tensors: prompt (float64), steps done, Adam's moments."""
        own = {"prompt": self.master.detach(), "steps_done": torch.tensor(self.optimizer.steps_done)}
        seen = {} if self.canaries is None else self.canaries.state()
        return own | optimizer_state(self.optimizer.original_optimizer) | {f"canaries.{n}": t for n, t in seen.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of :meth:`state`."""
        with torch.no_grad():
            self.master.copy_(tensors["prompt"])
            self.prompt.copy_(self.master)
        self.optimizer.steps_done = int(tensors["steps_done"])
        load_optimizer_state(self.optimizer.original_optimizer, tensors)
        for name, gathered in ({} if self.canaries is None else self.canaries.state()).items():
            gathered.copy_(tensors[f"canaries.{name}"])


def _one(losses: Tensor) -> Tensor:
    """The loss () of one row.

    Raises:
        InvalidInput: it isn't one number for one row.
    """
    if losses.shape != (1,):
        raise InvalidInput(
            f"a private step needs one loss per row, shape (1,), not {tuple(losses.shape)}: a mean over the batch "
            "would mix rows before they are clipped"
        )
    return losses[0]
