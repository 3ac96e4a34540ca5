"""Many prompts tuned in the same passes of the frozen student: every row is run behind a prompt of its own.

Nothing is shared between the prompts but the student. So each ends where it would have ended alone; tests compare.
Shapes: K prompts, B rows of a micro-batch, C classes, l prompt vectors, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from post_client.privacy import PromptDPSGD
from post_shared.batches import Batch, EncodedRows
from post_shared.label_words import label_words
from post_shared.language_model import LanguageModel
from post_shared.lean import LeanFreeLoss, lean_free
from post_shared.tasks import Task
from post_shared.training import Trainable, load_optimizer_state, optimizer_state, set_learning_rate

MICRO_BATCH = 16
"""Rows per pass, of all prompts together. Memory depends on it, the result doesn't."""
ONE_PROMPT = 64
"""Rows per pass of a single prompt, which runs again in every pass."""


class ManyRows:
    """The same rows once for each of K prompts: row r of prompt k has the number k * N + r."""

    def __init__(self, encoded: EncodedRows, prompts: int) -> None:
        self.rows = len(encoded)
        self.encoded = EncodedRows(encoded.rows * prompts)

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """One batch out of one list of rows for each prompt."""
        return self.encoded.batch([k * self.rows + row for k, some in enumerate(rows) for row in some])

    def owner(self, batch: Batch) -> Tensor:
        """The prompt of each row, (B,)."""
        return torch.tensor(batch.index) // self.rows

    def by_length(self, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
        """Micro-batches of similar length, whosever rows they are."""
        for part in batch.split(MICRO_BATCH):
            yield part, self.owner(part)

    def by_prompt(self, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
        """Micro-batches of whole prompts, those with long rows together: each prompt is then run once."""
        of: dict[int, list[int]] = {}
        for at in batch.index:
            of.setdefault(at // self.rows, []).append(at)
        waiting: list[int] = []
        for some in sorted(of.values(), key=lambda some: max(map(self.encoded.length, some))):
            if waiting and len(waiting) + len(some) > MICRO_BATCH:
                yield from self._cut(waiting)
                waiting = []
            waiting = waiting + some
        yield from self._cut(waiting)

    def _cut(self, index: Sequence[int]) -> Iterator[tuple[Batch, Tensor]]:
        for at in range(0, len(index), ONE_PROMPT):
            part = self.encoded.batch(index[at : at + ONE_PROMPT])
            yield part, self.owner(part)


class ManyLoss:
    """The loss that ``tune`` uses, for rows with prompts of their own: less the lean of the row's prompt, if any."""

    def __init__(self, model: LanguageModel, task: Task, leans: Sequence[LeanFreeLoss | None]) -> None:
        """``leans`` has one for each prompt; None where the loss is the plain cross-entropy."""
        self.model, self.words, self.leans = model, label_words(model, task), leans

    def look(self, step: int, prompts: Tensor) -> None:
        """Measure the lean of each prompt, (K, l, d), anew."""
        for lean, prompt in zip(self.leans, prompts, strict=True):
            if lean is not None:
                lean.look(step, prompt)

    def of_rows(self, prompts: Tensor, batch: Batch, owner: Tensor) -> Tensor:
        """Losses (B,) with prompts (B, l, d), one for each row, so that their gradients are the rows' own."""
        return self._losses(self.model.answer_logits(batch, prompts, self.words.token_ids), prompts, batch, owner)

    def of_prompts(self, prompts: Tensor, batch: Batch, owner: Tensor) -> Tensor:
        """The same with the prompts of all, (K, l, d): each is run once, and its gradient is the sum over its rows."""
        used = torch.tensor(_prompts_of(owner))
        own = torch.searchsorted(used, owner)
        logits = self.model.answer_logits_shared(batch, prompts[used], own, self.words.token_ids)
        return self._losses(logits, prompts[owner], batch, owner)

    def _losses(self, logits: Tensor, prompts: Tensor, batch: Batch, owner: Tensor) -> Tensor:
        scores = self.words.scores(logits)  # (B, C)
        lean = torch.zeros_like(scores)
        for k in _prompts_of(owner):
            known = self.leans[k]
            if known is not None and known.lean is not None:
                lean[owner == k] = known.lean.of(prompts[owner == k])
        return lean_free(scores, lean, batch.labels.to(scores.device))


def _prompts_of(owner: Tensor) -> list[int]:
    """The prompts that own a row, ascending."""
    return sorted(set(owner.tolist()))


class ManyOptimizer(Trainable, Protocol):
    """Moves K prompts by one step, each on its own rows."""

    @property
    def prompts(self) -> Tensor: ...
    def update(self, loss: ManyLoss, rows: ManyRows, batch: Batch) -> float | None: ...
    def set_learning_rate(self, learning_rate: float) -> None: ...


class ManyAdam:
    """As :class:`~post_shared.training.PromptAdam` on each prompt. Adam works element by element, so one serves all."""

    def __init__(self, start: Tensor, count: int, learning_rate: float) -> None:
        """``start`` is (l, d), the same for all."""
        self.prompts = nn.Parameter(start.detach().expand(count, -1, -1).clone())
        self.optimizer = torch.optim.Adam([self.prompts], lr=learning_rate)

    def update(self, loss: ManyLoss, rows: ManyRows, batch: Batch) -> float:
        """One step; the mean of the prompts' mean losses."""
        self.optimizer.zero_grad()
        share = 1.0 / rows.owner(batch).bincount(minlength=len(self.prompts))
        total = 0.0
        for part, owner in rows.by_prompt(batch):
            losses = loss.of_prompts(self.prompts, part, owner)
            mean = (losses * share[owner].to(losses.device)).sum()
            mean.backward()  # type: ignore[no-untyped-call]
            total += float(mean.detach())
        self.optimizer.step()
        return total / len(self.prompts)

    def set_learning_rate(self, learning_rate: float) -> None:
        set_learning_rate(self.optimizer, learning_rate)

    def state(self) -> dict[str, Tensor]:
        return {"prompts": self.prompts.detach()} | optimizer_state(self.optimizer)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.prompts.copy_(tensors["prompts"])
        load_optimizer_state(self.optimizer, tensors)


@dataclass(frozen=True)
class Inserted:
    """Gradients that an auditor puts into the sums of private steps, and its eye on what comes out (white box)."""

    gradients: Callable[[int, int], Tensor]
    """``gradients(k, step) -> (G, l, d)``: clipped and added like those of G more rows of prompt k."""
    see: Callable[[int, Tensor], None]
    """``see(k, noisy sum (l, d) less that of the real rows)``, after every step: the proof lets the auditor know every
    other row and when it was sampled."""
    state: Mapping[str, Tensor]
    """What the eye has gathered; kept with the run and filled again in place."""


class ManyDPSGD:
    """K private runs side by side: one pass for all rows; clipping, noise and Adam are each run's own."""

    def __init__(self, runs: Sequence[PromptDPSGD], inserted: Inserted | None = None) -> None:
        self.runs, self.inserted = runs, inserted

    @property
    def prompts(self) -> Tensor:
        return torch.stack([run.prompt.detach() for run in self.runs])

    def update(self, loss: ManyLoss, rows: ManyRows, batch: Batch) -> float | None:
        """One step of every run; the mean loss of the rows, or None when no run drew any."""
        values: list[Tensor] = []
        prompts = self.prompts
        for run in self.runs:
            run.begin()
        for part, owner in rows.by_length(batch):
            leaf = prompts[owner].requires_grad_()
            losses = loss.of_rows(leaf, part, owner)
            (gradients,) = torch.autograd.grad(losses.sum(), leaf)
            for k in _prompts_of(owner):
                self.runs[k].clip_and_accumulate(gradients[owner == k])
            values.append(losses.detach()[torch.isfinite(losses)].double())
        for k, run in enumerate(self.runs):
            self._finish(k, run)
        every = torch.cat(values) if values else torch.zeros(0)
        return float(every.mean()) if len(every) else None

    def _finish(self, k: int, run: PromptDPSGD) -> None:
        if self.inserted is not None:
            known = run.summed_gradient.clone()
            some = self.inserted.gradients(k, run.optimizer.steps_done)
            if len(some):
                run.clip_and_accumulate(some.to(run.master.device))
        run.add_noise()
        if self.inserted is not None:
            self.inserted.see(k, run.master.grad.detach() - known)
        run.divide_by_expected_batch_size()
        run.move()

    def set_learning_rate(self, learning_rate: float) -> None:
        for run in self.runs:
            run.set_learning_rate(learning_rate)

    def state(self) -> dict[str, Tensor]:
        own = {f"{k}/{name}": tensor for k, run in enumerate(self.runs) for name, tensor in run.state().items()}
        return own | ({} if self.inserted is None else {f"seen/{name}": t for name, t in self.inserted.state.items()})

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for k, run in enumerate(self.runs):
            begin = f"{k}/"
            run.load_state({n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)})
        for name, gathered in ({} if self.inserted is None else self.inserted.state).items():
            gathered.copy_(tensors[f"seen/{name}"])
