"""What a large logical batch costs in memory: a private step of 4,096 rows against one of a single micro-batch.

Of its micro-batches the one that takes most counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.dp_cost import LABEL_WORDS, reviews, student_shaped_model
from post_client.privacy import PrivacyConfig, PrivacyPlan
from post_client.privacy.bucketing import alike
from post_client.tuning.tune import encode_private, starting_prompt, tuning_objective
from post_shared.data.batches import Batch
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.memory_profiler import peak_bytes
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions

MICRO = 16


Step = Callable[[Batch], object]


def private_steps(
    model: LanguageModel, rows: Sequence[Row], *, micro: int, length: int = 20, longest: int | None = None
) -> tuple[Step, Batch]:
    """A private step on any batch of ``rows``, and all of them as one; the first step, for Adam's state, is done."""
    task, config = Task("{text}, it was", LABEL_WORDS), TuneOptions(num_virtual_tokens=length)
    encoded, loss = encode_private(model, task, rows, config), tuning_objective(model, task)
    plan = PrivacyPlan.make(PrivacyConfig(micro_batch_size=micro), 10 * len(rows), batch_size=len(rows), steps=10)
    prompt = nn.Parameter(starting_prompt(model, task, config).embeddings.clone().to(model.device))
    optimizer = plan.optimizer(prompt, config.learning_rate, longest=longest, student=model)
    optimizer.update(loss, encoded.batch([0, 1]))
    return partial(optimizer.update, loss), encoded.whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4096)
    given = parser.parse_args()
    model = student_shaped_model(given.layers)
    config = TuneOptions()
    step, whole = private_steps(model, reviews(given.rows), micro=MICRO, longest=config.max_length)
    result: dict[str, Any] = {}
    micro = alike(whole, MICRO, config.max_length, behind=config.num_virtual_tokens)
    for name, batches in (("micro_batch", micro), ("logical_batch", [whole])):
        result[f"{name}_tensor_bytes"] = max(peak_bytes(partial(step, batch)) for batch in batches)
        result[f"{name}_process_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["tensor_ratio"] = round(result["logical_batch_tensor_bytes"] / result["micro_batch_tensor_bytes"], 4)
    result["process_ratio"] = round(result["logical_batch_process_kib"] / result["micro_batch_process_kib"], 4)
    about = {"rows": given.rows, "micro": MICRO, "layers": model.layers, "torch": torch.__version__}
    print(json.dumps(about | {"machine": platform.machine()} | result, indent=2))


if __name__ == "__main__":
    main()
