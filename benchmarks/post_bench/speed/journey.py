"""The whole journey, tuning on the student and transferring, against tuning on the target model.

Steps are timed by the other parts; here they are added up for the default numbers of steps and public texts, the same
private rows, batch size and steps on both sides. Running both whole takes half an hour and more and gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from post_bench.speed.bench import Part
from post_bench.speed.parts import CONSTANT_ROWS, TEACHING
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import PLAIN


def journey(parts: Mapping[str, Part]) -> dict[str, float]:
    """Seconds of each leg and of the references, and how many times longer these take.

    The transfer is timed as a worker on this machine makes it.

    ``vs_target`` compares with PEFT and the Trainer on the target model, as one would do without POST; ``vs_own``
    with POST's own tuning step on the target model.
    """
    config = TransferOptions()
    of = {name: part.ways.get(TEACHING, part.ways["post"]).seconds for name, part in parts.items()}
    legs = {
        "tune": PLAIN.steps * of["tune_whole"],
        "precompute": config.max_rows / CONSTANT_ROWS * of["transfer_constants"],
        "transfer": config.steps * of["transfer"],
    }
    total = sum(legs.values())
    target = PLAIN.steps * parts["tune_target"].ways["peft"].seconds
    own = PLAIN.steps * of["tune_target"]
    return {**legs, "target": target, "target_own": own, "vs_target": target / total, "vs_own": own / total}
