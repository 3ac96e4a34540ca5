"""A memory plan of a distillation: what it will take beside the target, and in how many parts a batch has to run."""

from __future__ import annotations

from collections.abc import Sequence

from post_shared.errors import OutOfMemory
from post_shared.method.distillation.objective import parts_of
from post_shared.method.distillation.trainer import Descent, predictions
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import layers_of
from post_shared.model.memory_plan import SHARE, free_bytes, kept_bytes

FLOAT = 4
"""Bytes of a student's number."""
STATES = 3
"""What training adds for each trained weight: its gradient, and the two means of AdamW."""


def check_student(target: LanguageModel, kept: Sequence[int]) -> None:
    """The weights of a student of the ``kept`` layers fit the free memory.

    Raises:
        OutOfMemory: they don't.
    """
    layers = getattr(*layers_of(target))
    left_out = sum(w.numel() for at, layer in enumerate(layers) if at not in kept for w in layer.parameters())
    need, free = FLOAT * (target.parameters - left_out), free_bytes(target.device)
    if need > free:
        raise OutOfMemory(
            f"a student of {len(kept)} layers takes {_mb(need)} for its weights, and {_mb(free)} are free on "
            f"{target.device}; keep fewer layers, or use a machine with more memory"
        )


def plan_parts(descent: Descent, accumulate: int | None) -> int:
    """In how many parts each process takes its share of a batch: those asked for, or the fewest that fit.

    What a sequence keeps for the way back is measured on the first ones of the corpus.

    Raises:
        OutOfMemory: not even one sequence at a time fits, or not in the parts asked for.
    """
    device, size = descent.objective.target.device, descent.group.size
    rows, most = min(descent.rows, len(descent.corpus.blocks)), descent.most_parts
    free = free_bytes(device) // (size if device.type == "cpu" else 1)  # processes on a CPU share its memory
    trained: int = sum(weight.numel() for weight in descent.student.weights.values())
    fixed: int = FLOAT * STATES * trained
    each = kept_per_sequence(descent)
    budget = int(SHARE * free) if accumulate is None else free  # who asks for parts may know better

    def need(parts: int) -> int:
        return fixed + each * -(-rows // (size * parts))

    fitting = (parts for parts in range(1, most + 1) if need(parts) <= budget)
    parts = accumulate or next(fitting, most)
    if need(parts) > budget:
        raise OutOfMemory(
            f"training this student takes {_mb(fixed)} for the gradients and AdamW's state of {trained / 1e6:.1f} "
            f"million weights, and {_mb(need(parts) - fixed)} for a part of {-(-rows // (size * parts))} sequences; "
            f"{_mb(free)} are free on {device}; keep fewer layers, use shorter sequences (sequence_length) or more "
            "parts (gradient_accumulation_steps, up to one for each sequence), or a machine with more memory"
        )
    return parts


def kept_per_sequence(descent: Descent) -> int:
    """Bytes that a step keeps for the way back, for each sequence that runs at a time."""
    target, corpus = descent.objective.target, descent.corpus
    asked = predictions(target, corpus, 0, descent.rows, descent.seed, descent.share)
    blocks = corpus.numbers(0, descent.rows, descent.seed)
    weights = [*target.model.parameters(), *descent.student.model.model.parameters()]

    def kept(count: int) -> int:
        part = parts_of(asked, blocks, max(1, len(blocks) // count))[0]
        return kept_bytes(lambda: descent.losses(part), weights)

    one = kept(1)
    return max(1, (kept(3) - one) // 2 if len(blocks) >= 3 else one)


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
