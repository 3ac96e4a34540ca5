"""One step of distillation: the student's trained weights, and the gradients that each process computes for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from post_shared.errors import InvalidInput
from post_shared.method.distillation.corpus import Corpus, TokenTargets, masked_tokens, next_token
from post_shared.method.distillation.objective import MicroBatch, Objective, split_batch
from post_shared.model.language_model import LanguageModel
from post_shared.training.distributed import Group
from post_shared.training.optimizer import load_optimizer_state, optimizer_state, set_learning_rate

GRADIENT_NORM = 5.0
HEAD_SHARE = 0.25
"""Share of the positions at which the vocabulary losses are computed; L_cos is computed at all of them."""


class Student:
    """The student's trained weights and their AdamW optimizer, as the training loop saves them."""

    def __init__(
        self, model: LanguageModel, *, learning_rate: float, freeze_head: bool, freeze_embeddings: bool
    ) -> None:
        self.model = model
        head, embeddings = model.model.get_output_embeddings(), model.model.get_input_embeddings()
        frozen: set[nn.Parameter] = set()
        frozen |= set(head.parameters()) if freeze_head and head is not None else set()
        frozen |= set(embeddings.parameters()) if freeze_embeddings else set()  # the head too, if tied
        self.weights = {name: p for name, p in model.model.named_parameters() if p not in frozen}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(list(self.weights.values()), lr=learning_rate, fused=True)

    def step(self, learning_rate: float) -> None:
        """One AdamW step on the gradients that the weights hold."""
        set_learning_rate(self.optimizer, learning_rate)
        nn.utils.clip_grad_norm_(list(self.weights.values()), GRADIENT_NORM)
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        weights = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        return weights | optimizer_state(self.optimizer)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weight.{name}"])
        load_optimizer_state(self.optimizer, tensors)


@dataclass
class EarlyStopping:
    """Stops once the mean loss over ``window`` steps isn't ``min_decrease`` (a share) below the one before."""

    window: int = 200
    min_decrease: float = 0.002
    losses: list[float] = field(default_factory=list)

    def add(self, loss: float) -> None:
        self.losses.append(loss)

    def reached(self) -> bool:
        if len(self.losses) < 2 * self.window or len(self.losses) % self.window:
            return False
        previous, last = self.losses[-2 * self.window : -self.window], self.losses[-self.window :]
        return sum(last) > (1.0 - self.min_decrease) * sum(previous)


@dataclass(frozen=True)
class Training:
    """The state in a checkpoint: the student with its optimizer, and the losses that early stopping needs."""

    student: Student
    early_stopping: EarlyStopping

    def state(self) -> dict[str, Tensor]:
        return self.student.state() | {"losses": torch.tensor(self.early_stopping.losses, dtype=torch.float64)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.student.load_state(tensors)
        self.early_stopping.losses[:] = tensors["losses"].tolist()


@dataclass(frozen=True)
class DistillationStep:
    """A step of one process: its share of the batch, in ``gradient_accumulation_steps`` micro-batches."""

    student: Student
    objective: Objective
    corpus: Corpus
    group: Group
    rows: int
    gradient_accumulation_steps: int
    seed: int
    share: float = HEAD_SHARE

    def __post_init__(self) -> None:
        if self.max_micro_batches < self.gradient_accumulation_steps:
            rows, micro_batches = min(self.rows, len(self.corpus.blocks)), self.gradient_accumulation_steps
            raise InvalidInput(
                f"a batch of {rows} sequences can't be split over {self.group.size} processes and {micro_batches} "
                "micro-batches; use a larger batch (batch_tokens), more text or fewer gradient_accumulation_steps"
            )

    @property
    def max_micro_batches(self) -> int:
        """The largest number of micro-batches per process, each of at least one sequence."""
        return min(self.rows, len(self.corpus.blocks)) // self.group.size

    def losses(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """The micro-batch's share of the objective's losses and, as "loss", of the total that is minimised."""
        target = self.objective.target
        with torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16):
            losses = self.objective.losses(micro_batch)
        return {**losses, "loss": self.objective.total(losses)}

    def gradients(self, step: int) -> dict[str, float]:
        """Sum the gradients of the step's whole batch in the leader's weights; returns its losses (on the leader)."""
        weights, group = list(self.student.weights.values()), self.group
        group.broadcast(weights)
        self.student.optimizer.zero_grad()
        targets = predictions(self.objective.target, self.corpus, step, self.rows, self.seed, self.share)
        blocks = self.corpus.block_indices(step, self.rows, self.seed)
        sums: dict[str, Tensor] = {}
        for micro_batch in split_batch(targets, blocks, group.size * self.gradient_accumulation_steps)[
            group.rank :: group.size
        ]:
            losses = self.losses(micro_batch)
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            sums = {name: sums.get(name, 0.0) + loss.detach() for name, loss in losses.items()}
        group.reduce([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
        group.reduce(sums.values())
        return {name: float(value) for name, value in sums.items()}


def predictions(target: LanguageModel, corpus: Corpus, step: int, rows: int, seed: int, share: float) -> TokenTargets:
    """The targets of ``step``; for a causal model at ``share`` of the positions, and where a template ends."""
    block = corpus.batch(step, rows, seed)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    if target.kind == "masked":
        mask_token = int(target.tokenizer.mask_token_id)
        return masked_tokens(block, mask_token, target.vocabulary, corpus.counts, generator)
    return next_token(block, share, generator, answer_end=corpus.end if corpus.answers else None)
