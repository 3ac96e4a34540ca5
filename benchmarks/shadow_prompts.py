"""Many shadow prompts tuned at once against one after another: seconds per prompt and step, and what bounds them.

Three ways: one after another as ``post tune`` runs; one after another, but each step runs the prompt once for all its
rows; all at once. Beside the seconds stands the arithmetic that each way needs and the share of this machine's own
matrix rate that it reaches: where one after another already keeps the cores busy, all at once can only save arithmetic.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.dp_cost import LABEL_WORDS, reviews, student_shaped_model
from post_bench.speed.arithmetic import Arithmetic
from post_bench.speed.machine import matrix_rate
from post_client.audit.many import ManyAdam, ManyDPSGD, ManyLoss, ManyRows
from post_client.privacy import PrivacyConfig
from post_client.tuning import TuneConfig, encode_private, starting_prompt, tuning_objective
from post_shared.batches import Batch, EncodedRows, ShuffledBatches
from post_shared.data import read_rows
from post_shared.label_words import label_words
from post_shared.language_model import LanguageModel
from post_shared.losses import label_word_loss
from post_shared.tasks import Task
from post_shared.training import PromptAdam

Clock = Callable[[], float]
Way = tuple[Callable[[int], None], float]
"""One step of all prompts, and the arithmetic (FLOP) of a step on average."""


def work(model: LanguageModel, rows: int, tokens: int) -> float:
    """FLOP forward and backward of ``tokens`` in the layers and ``rows`` in the head."""
    return Arithmetic.of(model).to_prompt(tokens, rows)


def ways(
    model: LanguageModel, encoded: EncodedRows, start: Tensor, task: Task, *, count: int, batch_size: int, private: bool
) -> dict[str, Way]:
    """Each way of making one step of all prompts. All see the same rows; padding isn't counted as work."""
    length, loss = int(start.shape[0]), tuning_objective(model, task)
    batches = [ShuffledBatches(encoded, batch_size, seed) for seed in range(count)]
    privacy = PrivacyConfig(seed=0).plan(len(encoded), batch_size=batch_size, steps=100)
    tokens = int(np.mean([encoded.length(row) for row in range(len(encoded))]) * batch_size)
    words = label_words(model, task)

    def shared(prompt: Tensor, batch: Batch) -> Tensor:
        return label_word_loss(words.of(model.answer_logits_shared(batch, prompt)), batch.labels)

    alone = work(model, batch_size, tokens + batch_size * length) * count
    once = work(model, batch_size, tokens + length) * count
    fresh: Callable[[], nn.Parameter] = lambda: nn.Parameter(start.clone())  # noqa: E731
    many, every = ManyRows(encoded, count), ManyLoss(model, task, [None] * count)

    def together(optimizer: ManyAdam | ManyDPSGD) -> Callable[[int], None]:
        return lambda step: void(optimizer.update(every, many, many.batch([each(step).index for each in batches])))

    def in_turn(optimizers: list[PromptAdam], objective: Callable[[Tensor, Batch], Tensor]) -> Callable[[int], None]:
        pairs = list(zip(optimizers, batches, strict=True))
        return lambda step: void(*(own.update(objective, Batch(encoded, each(step).index)) for own, each in pairs))

    if private:
        singles = [privacy.optimizer(fresh(), 0.01) for _ in range(count)]
        runs = [privacy.optimizer(fresh(), 0.01) for _ in range(count)]
        return {
            "one_by_one": (in_turn(singles, loss), alone),  # type: ignore[arg-type]
            "at_once": (together(ManyDPSGD(runs)), alone),
        }
    plain: Callable[[], list[PromptAdam]] = lambda: [PromptAdam(fresh(), 0.01) for _ in range(count)]  # noqa: E731
    return {
        "one_by_one": (in_turn(plain(), loss), alone),
        "one_by_one_prompt_once": (in_turn(plain(), shared), once),
        "at_once": (together(ManyAdam(start, count, 0.01)), once),
    }


def void(*_: object) -> None:
    """A step's result is not looked at."""


def measure(
    model: LanguageModel,
    encoded: EncodedRows,
    start: Tensor,
    task: Task,
    *,
    count: int,
    batch_size: int,
    steps: int,
    private: bool = False,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """For each way: median seconds per prompt and step, and its arithmetic; ``steps`` rounds of all ways in turn."""
    some = ways(model, encoded, start, task, count=count, batch_size=batch_size, private=private)
    seconds: dict[str, list[float]] = {name: [] for name in some}
    for step in range(steps + 1):
        for name, (go, _) in some.items():
            began = clock()
            go(step)
            if step:  # the first one warms up
                seconds[name].append(clock() - began)
    base = seconds["one_by_one"]
    return {
        name: {
            "seconds_per_prompt_step": statistics.median(seconds[name]) / count,
            "gflop_per_prompt_step": flop / count / 1e9,
            "times_faster": statistics.median(a / b for a, b in zip(base, seconds[name], strict=True)),
            "times_less_arithmetic": some["one_by_one"][1] / flop,
        }
        for name, (_, flop) in some.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a real model instead of random weights")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--data", type=Path, help="real rows with the labels of sst2, instead of random words")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--length", type=int, nargs="+", default=[20, 100], help="vectors in the prompt")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each way")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="not the time on the wall: for a machine with other work, 1 thread",
    )
    given = parser.parse_args()
    clock = time.process_time if given.processor_time else time.perf_counter
    model = LanguageModel.load(given.model) if given.model else student_shaped_model(given.layers)
    task = Task.preset("sst2") if given.data else Task("{text}, it was", LABEL_WORDS)
    rows = read_rows(given.data, labels=task.labels)[:1000] if given.data else reviews(1000)
    about = {
        "layers": model.layers,
        "prompts": given.prompts,
        "clock": "processor" if given.processor_time else "wall",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    for length in given.length:
        for batch_size in given.batch_size:
            for private in (False, True):
                config = TuneConfig(length=length)
                encoded, start = encode_private(model, task, rows, config), starting_prompt(model, task, config)
                rate = matrix_rate(clock=clock, seconds=1.0)
                found = measure(
                    model, encoded, start.embeddings, task, count=given.prompts, batch_size=batch_size,
                    steps=given.steps, private=private, clock=clock,
                )  # fmt: skip
                for each in found.values():
                    reached = each["gflop_per_prompt_step"] * 1e9 / each["seconds_per_prompt_step"]
                    each["share_of_matrix_rate"] = reached / rate
                case = {"length": length, "batch_size": batch_size, "private": private, "matrix_gflop_s": rate / 1e9}
                tidy = {name: {key: round(value, 4) for key, value in each.items()} for name, each in found.items()}
                print(json.dumps(about | case | tidy), flush=True)


if __name__ == "__main__":
    main()
