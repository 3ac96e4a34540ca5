"""PromptDPSGD (Duan et al. 2023): differentially private tuning of a soft prompt, one step at a time.

Per-example gradients are exact here. The prompt is expanded over the batch as a leaf [B, l, d], so each row of the
leaf's gradient is one example's gradient. In a causal student the prompt is run once a step, and each row goes back
through that run by itself (:meth:`LanguageModel.share_prefix`). (Opacus's hooks on PEFT's prompt tuning are silently
wrong: PEFT embeds one prompt and repeats the output, so the hooks see one row for the whole batch.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from post_client.privacy.bucketing import alike, most
from post_client.privacy.noise import gaussian
from post_client.privacy.randomness import Randomness
from post_shared.data.batches import Batch
from post_shared.errors import InvalidInput
from post_shared.model.language_model import LanguageModel
from post_shared.model.prefix import SharedPrefix
from post_shared.training.optimizer import Loss, load_optimizer_state, optimizer_state, set_learning_rate


class RowGradients(NamedTuple):
    """Of B rows, by their numbers: losses (B,) and gradients (B, l, d)."""

    rows: Sequence[int]
    losses: Tensor
    gradients: Tensor


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


class PromptDPSGD:
    """Adam on a prompt (l, d), with every step differentially private with respect to one row.

    Args:
        prompt: the float32 prompt that the loss sees; updated in place after every step.
        noise_multiplier: σ. The noise has standard deviation σ times ``max_grad_norm``; the guarantee follows from
            σ, the sampling rate and the number of steps, and holds only if batches are Poisson-sampled.
        max_grad_norm: c. No row moves the sum of gradients by more than c.
        expected_batch_size: sampling rate times number of rows. Sums are divided by it, never by a batch's
            real size, which is a secret.
        micro_batch_size: rows per forward and backward pass; of rows shorter than ``longest``, as many as take no more
            positions. Memory depends on it, the result doesn't.
        longest: tokens beyond which no row is padded; None: no such limit. See :mod:`post_client.privacy.bucketing`.
        student: the model that the loss asks. Its prompt is run once a step where it can; without it each row runs it.
    """

    def __init__(
        self,
        prompt: nn.Parameter,
        learning_rate: float,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        micro_batch_size: int,
        randomness: Randomness,
        longest: int | None = None,
        student: LanguageModel | None = None,
    ) -> None:
        self.prompt = prompt
        self.micro_batch_size, self.longest = micro_batch_size, longest
        self.student = student if student is not None and student.can_share_prefix(len(prompt), longest) else None
        self.canaries: Canaries | None = None
        """Set by an audit."""
        self.shared: SharedPrefix | None = None  # of this step
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
        total, counted = 0.0, 0
        self.begin()
        for losses in self.accumulate(loss, batch):
            finite = losses[torch.isfinite(losses)].double()
            total, counted = total + float(finite.sum()), counted + len(finite)
        self.add_noise()
        self.divide_by_expected_batch_size()
        self.move()
        return total / counted if counted else None

    def begin(self) -> None:
        """A new step: the sum is zero."""
        self.shared = None
        self.optimizer.zero_grad()
        self.master.summed_grad = torch.zeros_like(self.master, requires_grad=False)

    def accumulate(self, loss: Loss, batch: Batch) -> Iterator[Tensor]:
        """Add the clipped gradients of a batch to the sum, some rows at a time; yields their losses (B,)."""
        for _, losses, gradients in self.per_row_gradients(loss, batch):
            self.clip_and_accumulate(gradients)
            yield losses

    def per_row_gradients(self, loss: Loss, batch: Batch) -> Iterator[RowGradients]:
        """The gradients of a batch's rows, some at a time, each row's that of its own loss alone."""
        parts = alike(batch, self.micro_batch_size, self.longest, behind=len(self.prompt))
        if self.student is not None and self.shared is None and parts:
            self.shared = self.student.share_prefix(self.prompt)
        while parts:  # a part keeps its tensors as long as it lives, so none may outlive its turn
            yield self._own_runs(loss, parts.pop()) if self.shared is None else self._one_run(loss, parts, self.shared)

    def _own_runs(self, loss: Loss, part: Batch) -> RowGradients:
        """Every row runs the prompt."""
        leaf = self.prompt.detach().expand(len(part), -1, -1).clone().requires_grad_()  # (l, d) -> (B, l, d)
        losses = _one_each(loss(leaf, part), part)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
        return RowGradients(part.index, losses.detach(), gradients)

    def _one_run(self, loss: Loss, parts: list[Batch], shared: SharedPrefix) -> RowGradients:
        """The last of ``parts``, as many as fill a pass, stand behind one run and go back through it together.

        No more wait for that than take the positions of a micro-batch.
        """
        length = len(self.prompt)
        reserved = None if self.longest is None else self.longest + length
        enough = min(shared.rows_per_pass, most(self.micro_batch_size, length, reserved))
        index: list[int] = []
        losses: list[Tensor] = []
        gradients: list[tuple[Tensor, ...]] = []
        while parts and len(index) < enough:
            part = parts.pop()
            rows = shared.rows(len(part))
            found = _one_each(loss(rows, part), part)
            gradients.append(rows.gradients(found))
            losses.append(found.detach())
            index += part.index
        return RowGradients(
            index, torch.cat(losses), shared.back([torch.cat(each) for each in zip(*gradients, strict=True)])
        )

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
        """Once per step, to the sum over all micro-batches."""
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
        self.shared = None
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


def _one_each(losses: Tensor, part: Batch) -> Tensor:
    """The losses, if they are one for each row.

    Raises:
        InvalidInput: they aren't.
    """
    if losses.shape != (len(part),):
        raise InvalidInput(
            f"a private step needs one loss per row, shape ({len(part)},), not {tuple(losses.shape)}: a mean over "
            "the batch would mix rows before they are clipped"
        )
    return losses
