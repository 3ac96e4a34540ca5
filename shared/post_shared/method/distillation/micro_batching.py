"""The memory plan of a distillation: what it needs beside the target, and in how many micro-batches a batch runs."""

from __future__ import annotations

from collections.abc import Sequence

from post_shared.errors import OutOfMemory
from post_shared.method.distillation.objective import split_batch
from post_shared.method.distillation.trainer import DistillationStep, predictions
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import layers_of
from post_shared.model.memory_plan import SHARE, free_bytes, kept_bytes

FLOAT_BYTES = 4
"""Bytes of a student's weight (float32)."""
TRAINING_STATES = 3
"""Values that training adds for each trained weight: its gradient and AdamW's two moments."""


def check_student_fits(target: LanguageModel, kept: Sequence[int]) -> None:
    """Check that the weights of a student of the ``kept`` layers fit the free memory.

    Raises:
        OutOfMemory: they don't.
    """
    layers = getattr(*layers_of(target))
    removed = sum(w.numel() for i, layer in enumerate(layers) if i not in kept for w in layer.parameters())
    need, free = FLOAT_BYTES * (target.parameters - removed), free_bytes(target.device)
    if need > free:
        raise OutOfMemory(
            f"the weights of a student of {len(kept)} layers take {_mb(need)}, but {_mb(free)} are free on "
            f"{target.device}; keep fewer layers, or use a machine with more memory"
        )


def plan_micro_batches(step: DistillationStep, accumulation_steps: int | None) -> int:
    """The number of micro-batches per process: ``accumulation_steps`` if given, or the fewest that fit the memory.

    The activations of a sequence are measured on the first ones of the corpus.

    Raises:
        OutOfMemory: not even one sequence at a time fits, or ``accumulation_steps`` micro-batches don't.
    """
    device, size = step.objective.target.device, step.group.size
    rows, limit = min(step.rows, len(step.corpus.blocks)), step.max_micro_batches
    free = free_bytes(device) // (size if device.type == "cpu" else 1)  # processes on a CPU share its memory
    trained: int = sum(weight.numel() for weight in step.student.weights.values())
    fixed: int = FLOAT_BYTES * TRAINING_STATES * trained
    per_sequence = activation_bytes(step)
    budget = int(SHARE * free) if accumulation_steps is None else free  # an explicit number may use all that is free

    def need(count: int) -> int:
        return fixed + per_sequence * -(-rows // (size * count))

    fitting = (count for count in range(1, limit + 1) if need(count) <= budget)
    count = accumulation_steps or next(fitting, limit)
    if need(count) > budget:
        raise OutOfMemory(
            f"training this student takes {_mb(fixed)} for the gradients and AdamW state of {trained / 1e6:.1f} "
            f"million weights, and {_mb(need(count) - fixed)} for a micro-batch of {-(-rows // (size * count))} "
            f"sequences; {_mb(free)} are free on {device}; keep fewer layers, use shorter sequences (sequence_length) "
            "or more micro-batches (gradient_accumulation_steps, up to one per sequence), or a machine with more memory"
        )
    return count


def activation_bytes(step: DistillationStep) -> int:
    """Bytes that the backward pass of a step needs for each sequence that runs at a time."""
    target, corpus = step.objective.target, step.corpus
    targets = predictions(target, corpus, 0, step.rows, step.seed, step.share)
    blocks = corpus.block_indices(0, step.rows, step.seed)
    weights = [*target.model.parameters(), *step.student.model.model.parameters()]

    def saved(sequences: int) -> int:
        micro_batch = split_batch(targets, blocks, max(1, len(blocks) // sequences))[0]
        return kept_bytes(lambda: step.losses(micro_batch), weights)

    one = saved(1)
    return max(1, (saved(3) - one) // 2 if len(blocks) >= 3 else one)


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
