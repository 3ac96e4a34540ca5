"""The whole journey (tuning on the student, then transfer) against tuning on the target model.

The other parts time the steps; here they are added up for the default numbers of steps and public texts, with the
same private rows, batch size and steps on both sides. Whole runs take over half an hour and give the same result.
"""

from __future__ import annotations

from collections.abc import Mapping

from post_bench.speed.bench import Part
from post_bench.speed.parts import PRECOMPUTE_ROWS, TEACHING
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import PLAIN


def journey(parts: Mapping[str, Part]) -> dict[str, float]:
    """Seconds of each leg and of the references, and the references' times relative to the journey.

    The transfer is timed in the dtype that a worker uses on this machine. ``vs_target`` compares with PEFT and the
    Trainer on the target model, the usual way without POST; ``vs_own`` with POST's own tuning step on the target.
    """
    config = TransferOptions()
    seconds = {name: part.ways.get(TEACHING, part.ways["post"]).seconds for name, part in parts.items()}
    legs = {
        "tune": PLAIN.steps * seconds["tune_whole"],
        "precompute": config.max_rows / PRECOMPUTE_ROWS * seconds["transfer_constants"],
        "transfer": config.steps * seconds["transfer"],
    }
    total = sum(legs.values())
    target = PLAIN.steps * parts["tune_target"].ways["peft"].seconds
    own = PLAIN.steps * seconds["tune_target"]
    return {**legs, "target": target, "target_own": own, "vs_target": target / total, "vs_own": own / total}
