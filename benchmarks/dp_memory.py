"""The memory of a large logical batch: a private step on 4,096 rows against one on the longest row alone."""

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
from post_client.tuning.tune import encode_private, starting_prompt, tuning_objective
from post_shared.data.batches import Batch
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.memory_profiler import peak_bytes
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions

Step = Callable[[Batch], object]


def private_steps(model: LanguageModel, rows: Sequence[Row], *, length: int = 20) -> tuple[Step, Batch]:
    """A private step on any batch of ``rows``, and the batch of all rows. A first step has created Adam's state."""
    task, config = Task("{text}, it was", LABEL_WORDS), TuneOptions(num_virtual_tokens=length)
    encoded, loss = encode_private(model, task, rows, config), tuning_objective(model, task)
    plan = PrivacyPlan.make(PrivacyConfig(), 10 * len(rows), batch_size=len(rows), steps=10)
    prompt = nn.Parameter(starting_prompt(model, task, config).embeddings.clone().to(model.device))
    optimizer = plan.optimizer(prompt, config.learning_rate)
    optimizer.update(loss, encoded.batch([0, 1]))
    return partial(optimizer.update, loss), encoded.whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4096)
    arguments = parser.parse_args()
    model = student_shaped_model(arguments.layers)
    step, whole = private_steps(model, reviews(arguments.rows))
    longest = max(whole.index, key=lambda at: len(whole.encoded.rows[at].token_ids))
    result: dict[str, Any] = {}
    for name, batch in (("row", Batch(whole.encoded, (longest,))), ("logical_batch", whole)):
        result[f"{name}_tensor_bytes"] = peak_bytes(partial(step, batch))
        result[f"{name}_process_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["tensor_ratio"] = round(result["logical_batch_tensor_bytes"] / result["row_tensor_bytes"], 4)
    result["process_ratio"] = round(result["logical_batch_process_kib"] / result["row_process_kib"], 4)
    about = {"rows": arguments.rows, "layers": model.layers, "torch": torch.__version__}
    print(json.dumps(about | {"machine": platform.machine()} | result, indent=2))


if __name__ == "__main__":
    main()
