"""Cost curves: how the time of a step grows with one size, with the other sizes at their defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from post_bench.speed.bench import Bench, Race
from post_bench.speed.parts import precompute, predict, transfer, tune
from post_shared.method.distillation.layer_selection import chosen_layers
from post_shared.model.layers import copy_student


@dataclass(frozen=True)
class Curve:
    """``race(bench, value)`` is timed at each of ``values``."""

    what: str
    values: Sequence[int]
    race: Callable[[Bench, int], Race[Any]]


def _of_length(bench: Bench, words: int) -> Bench:
    """A bench with texts of ``words`` words each, made from the public texts."""
    stream = " ".join(bench.public).split()
    count = min(len(bench.public), max(64, len(stream) // words))
    while len(stream) < count * words:
        stream += stream
    texts = [" ".join(stream[index * words : (index + 1) * words]) for index in range(count)]
    return replace(bench, public=texts, max_length=max(bench.max_length, 4 * words))


def _layers(bench: Bench, count: int) -> Bench:
    return replace(bench, student=copy_student(bench.target, chosen_layers(count, bench.target.layers)))


CURVES = {
    "prompt_length": Curve(
        "transfer step over vectors in the prompt", (10, 20, 50, 100), lambda b, n: transfer(replace(b, length=n))
    ),
    "text_length": Curve("transfer step over words per text", (8, 16, 32, 64), lambda b, n: transfer(_of_length(b, n))),
    "batch": Curve(
        "transfer step over texts per batch", (4, 8, 16, 32), lambda b, n: transfer(replace(b, batch_size=n))
    ),
    "public_texts": Curve(
        "teacher outputs of a transfer over public texts",
        (32, 64, 128, 256),
        lambda b, n: precompute(b, rows=n),
    ),
    "prompts": Curve("predict over prompts per batch", (1, 4, 16, 64), lambda b, n: predict(b, count=n)),
    "layers": Curve("tuning step over the student's layers", (2, 4, 8, 15), lambda b, n: tune(_layers(b, n))),
}
"""All curves by name."""


def measure(bench: Bench, name: str, rounds: int) -> list[dict[str, float]]:
    """The points of one curve: value, seconds of a step, and share of the matrix rate."""
    curve, points = CURVES[name], []
    for value in curve.values:
        if name == "layers" and value > bench.target.layers:
            continue
        part = curve.race(bench, value).alone().run(rounds, bench.device, bench.target.dtype)
        ours = part.ways["post"]
        points.append({"value": value, "seconds": ours.seconds, "share": ours.share or 0.0})
    return points
