"""The cost of differential privacy per tuning step: private and plain steps alternate on the same batches."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch
from tests.models import WORDS, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from post_client.privacy import PrivacyConfig, PrivacyPlan
from post_client.tuning.tune import encode_private, starting_prompt, tuning_objective
from post_client.tuning.tune import tune as tune_prompt
from post_shared.data.batches import Batch
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.optimizer import PromptAdam, PromptOptimizer

LABEL_WORDS = {"negative": ("terrible", "bad"), "positive": ("great", "good")}


def student_shaped_model(layers: int) -> LanguageModel:
    """A model with random weights in the shape of the demo's student."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer(masked=False))


def reviews(count: int, seed: int = 0) -> list[Row]:
    """Rows of 10 to 40 words, about as long as one-sentence movie reviews."""
    draw = random.Random(seed)
    labels = sorted(LABEL_WORDS)
    return [Row(" ".join(draw.choices(WORDS, k=draw.randint(10, 40))), labels[i % 2]) for i in range(count)]


def measure(model: LanguageModel, *, batch_size: int, steps: int, length: int) -> dict[str, float]:
    """Median seconds of each kind of step, and the median ratio of the pairs."""
    task, rows, tune = (
        Task("{text}, it was", LABEL_WORDS),
        reviews(batch_size * 20),
        TuneOptions(num_virtual_tokens=length),
    )
    encoded, loss = encode_private(model, task, rows, tune), tuning_objective(model, task)
    start = starting_prompt(model, task, tune).embeddings
    plan = PrivacyPlan.make(PrivacyConfig(), len(rows), batch_size=batch_size, steps=steps)
    plain = PromptAdam(nn.Parameter(start.clone().to(model.device)), tune.learning_rate)
    private = plan.optimizer(nn.Parameter(start.clone().to(model.device)), tune.learning_rate)
    draw, pairs = random.Random(1), []
    for step in range(steps + 2):
        batch = Batch(encoded, tuple(draw.sample(range(len(rows)), batch_size)))
        order: list[tuple[str, PromptOptimizer]] = [("plain", plain), ("private", private)]
        seconds = {name: _seconds(optimizer, loss, batch) for name, optimizer in order[:: 1 if step % 2 else -1]}
        if step >= 2:  # the first pairs are a warm-up
            pairs.append(seconds)
    return {
        "plain_seconds": statistics.median(pair["plain"] for pair in pairs),
        "private_seconds": statistics.median(pair["private"] for pair in pairs),
        "ratio": statistics.median(pair["private"] / pair["plain"] for pair in pairs),
    }


def measure_runs(model: LanguageModel, *, batch_size: int, steps: int, length: int, rounds: int = 3) -> float:
    """Whole runs of ``tune`` with the same batch size and steps, alternating: the median ratio private / plain.

    Plain tuning may group rows of similar length; in a private run, every row runs alone.
    """
    task, rows = Task("{text}, it was", LABEL_WORDS), reviews(batch_size * 40)
    config = TuneOptions(num_virtual_tokens=length, steps=steps, batch_size=batch_size)
    budget = PrivacyConfig()
    # Caches the search for the noise, which isn't part of tuning.
    PrivacyPlan.make(budget, len(rows), batch_size=batch_size, steps=steps)
    ratios = []
    for _ in range(rounds):
        seconds = []
        for privacy in (None, budget):
            began = time.perf_counter()
            tune_prompt(model, task, rows, config, privacy=privacy)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def _seconds(optimizer: PromptOptimizer, loss: object, batch: Batch) -> float:
    fresh = Batch(batch.encoded, batch.index)  # neither step profits from the other's cached tensors
    began = time.perf_counter()
    optimizer.update(loss, fresh)  # type: ignore[arg-type]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a real model, instead of random weights")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=20, help="prompt vectors")
    parser.add_argument("--steps", type=int, default=20, help="measured pairs")
    arguments = parser.parse_args()
    model = LanguageModel.load(arguments.model) if arguments.model else student_shaped_model(arguments.layers)
    result = measure(model, batch_size=arguments.batch_size, steps=arguments.steps, length=arguments.length)
    result["run_ratio"] = measure_runs(
        model, batch_size=arguments.batch_size, steps=2 * arguments.steps, length=arguments.length
    )
    about = {
        "batch_size": arguments.batch_size,
        "length": arguments.length,
        "pairs": arguments.steps,
        "layers": model.layers,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(about | {name: round(value, 4) for name, value in result.items()}, indent=2))


if __name__ == "__main__":
    main()
