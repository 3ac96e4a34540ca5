"""The descent: the student's weights, and the gradients that one process computes for them in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from post_shared.errors import InvalidInput
from post_shared.method.distillation.corpus import Corpus, TokenTargets, masked_tokens, next_token
from post_shared.method.distillation.objective import Objective, Part, parts_of
from post_shared.model.language_model import LanguageModel
from post_shared.training.distributed import Group
from post_shared.training.optimizer import load_optimizer_state, optimizer_state, set_learning_rate

GRADIENT_NORM = 5.0
HEAD_SHARE = 0.25
"""Share of the positions at which the vocabulary losses are taken; the cosine is taken at all of them."""


class Student:
    """The student's trained weights with their AdamW, as the training loop sees them."""

    def __init__(
        self, model: LanguageModel, *, learning_rate: float, freeze_head: bool, freeze_embeddings: bool
    ) -> None:
        self.model = model
        head, embeddings = model.model.get_output_embeddings(), model.model.get_input_embeddings()
        frozen: set[nn.Parameter] = set()
        frozen |= set(head.parameters()) if freeze_head and head is not None else set()
        frozen |= set(embeddings.parameters()) if freeze_embeddings else set()  # one and the same when tied
        self.weights = {name: p for name, p in model.model.named_parameters() if p not in frozen}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(list(self.weights.values()), lr=learning_rate, fused=True)

    def step(self, learning_rate: float) -> None:
        """One step on the gradients that the weights hold."""
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
    """True once the loss, smoothed over ``window`` steps, no longer falls by ``share`` from one window to the next."""

    window: int = 200
    share: float = 0.002
    seen: list[float] = field(default_factory=list)

    def add(self, loss: float) -> None:
        self.seen.append(loss)

    def reached(self) -> bool:
        if len(self.seen) < 2 * self.window or len(self.seen) % self.window:
            return False
        before, now = self.seen[-2 * self.window : -self.window], self.seen[-self.window :]
        return sum(now) > (1.0 - self.share) * sum(before)


@dataclass(frozen=True)
class Training:
    """What a checkpoint keeps: the student with its optimizer, and the losses that tell a plateau."""

    student: Student
    plateau: EarlyStopping

    def state(self) -> dict[str, Tensor]:
        return self.student.state() | {"losses": torch.tensor(self.plateau.seen, dtype=torch.float64)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.student.load_state(tensors)
        self.plateau.seen[:] = tensors["losses"].tolist()


@dataclass(frozen=True)
class Descent:
    """What each process does in a step: its share of the batch, in ``accumulate`` parts one after the other."""

    student: Student
    objective: Objective
    corpus: Corpus
    group: Group
    rows: int
    gradient_accumulation_steps: int
    seed: int
    share: float = HEAD_SHARE

    def __post_init__(self) -> None:
        if self.most_parts < self.gradient_accumulation_steps:
            rows = min(self.rows, len(self.corpus.blocks))
            raise InvalidInput(
                f"a batch of {rows} sequences can't be split over {self.group.size} processes and {self.gradient_accumulation_steps} "
                "micro-batches; use a larger batch (batch_tokens), more text or fewer gradient_accumulation_steps"
            )

    @property
    def most_parts(self) -> int:
        """In how many parts each process can take its share of a batch."""
        return min(self.rows, len(self.corpus.blocks)) // self.group.size

    def losses(self, part: Part) -> dict[str, Tensor]:
        """The part's share of the objective's losses and, as "loss", what is minimised."""
        target = self.objective.target
        with torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16):
            losses = self.objective.losses(part)
        return {**losses, "loss": self.objective.total(losses)}

    def gradients(self, step: int) -> dict[str, float]:
        """Leave the gradients of the step's whole batch in the leader's weights; returns its losses there."""
        weights, group = list(self.student.weights.values()), self.group
        group.share(weights)
        self.student.optimizer.zero_grad()
        prediction = predictions(self.objective.target, self.corpus, step, self.rows, self.seed, self.share)
        blocks = self.corpus.numbers(step, self.rows, self.seed)
        sums: dict[str, Tensor] = {}
        for part in parts_of(prediction, blocks, group.size * self.gradient_accumulation_steps)[
            group.rank :: group.size
        ]:
            losses = self.losses(part)
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            sums = {name: sums.get(name, 0.0) + loss.detach() for name, loss in losses.items()}
        group.add([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
        group.add(sums.values())
        return {name: float(value) for name, value in sums.items()}


def predictions(target: LanguageModel, corpus: Corpus, step: int, rows: int, seed: int, share: float) -> TokenTargets:
    """What is asked in a step; of a causal model at that share of the positions, and where an answer form ends."""
    block = corpus.batch(step, rows, seed)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    if target.kind == "masked":
        mask = int(target.tokenizer.mask_token_id)
        return masked_tokens(block, mask, target.vocabulary, corpus.counts, generator)
    return next_token(block, share, generator, answer_end=corpus.end if corpus.answers else None)
