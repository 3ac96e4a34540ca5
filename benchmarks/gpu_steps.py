"""Transfer and tuning steps on a GPU: with CUDA graphs, launched kernel by kernel, and as the published loop.

The models have random weights in the shapes of real ones, as the time of a step doesn't depend on the weights.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tests.models import WORDS, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from post_bench.speed.arithmetic import prompt_step
from post_bench.speed.bench import fresh, steps, tokens_of
from post_bench.speed.machine import about, matrix_rate
from post_bench.speed.references import PublishedTransfer
from post_client.privacy import PrivacyConfig, PrivacyPlan
from post_shared.data.batches import Batch, EncodedRow, EncodedRows
from post_shared.data.tasks import Task
from post_shared.method.distillation.layer_selection import chosen_layers
from post_shared.method.transfer import transfer as moving
from post_shared.method.transfer.teacher_outputs import TeacherOutputs
from post_shared.method.transfer.transfer import ensemble_objective
from post_shared.method.tuning.tune import tuning_objective
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.model.memory_plan import plan_step
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import label_words
from post_shared.training.optimizer import PromptAdam

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})
SHAPES = {  # width, inner width, layers, heads, key/value heads, vocabulary
    "135M": (576, 1536, 30, 9, 3, 49_152),
    "1.2B": (2048, 8192, 16, 32, 8, 128_256),
    "7B": (4096, 14_336, 32, 32, 8, 32_000),
}
STUDENT_LAYERS = 8
Ways = dict[str, Callable[[Batch], object]]
CASES = ((16, 40, 20), (64, 60, 20), (16, 40, 100), (64, 60, 100))
"""(rows, tokens of the longest text (the shortest has half), prompt vectors)."""


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """A model with random weights in the given shape."""
    width, inner, layers, heads, shared, vocabulary = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=2048,
        tie_word_embeddings=vocabulary > 40_000,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LanguageModel(model, tokenizer(masked=False))


def texts(rows: int, tokens: int) -> Batch:
    """A batch of rows with ``tokens / 2`` to ``tokens`` random tokens each."""
    draw = random.Random(0)
    lengths = [tokens, *(draw.randint(tokens // 2, tokens) for _ in range(rows - 1))]
    ids = [[draw.randint(10, 300) for _ in range(length)] for length in lengths]
    return EncodedRows(tuple(EncodedRow(row, [len(row) - 1], [], index % 2) for index, row in enumerate(ids))).whole


def adam(start: Tensor) -> PromptAdam:
    return PromptAdam(nn.Parameter(start.clone()), 1e-3)


def transfer(target: LanguageModel, batch: Batch, start: Tensor) -> Ways:
    words = label_words(target, TASK)
    outputs = torch.randn(len(batch), 2), torch.empty(0), torch.randn(len(batch), 2)
    loss = ensemble_objective(target, TeacherOutputs(*outputs, batch.encoded.whole), 0.7, words)
    student = copy_student(target, chosen_layers(min(STUDENT_LAYERS, target.layers), target.layers))
    published = PublishedTransfer(target, student, start, alpha=0.7, temperature=2.0)
    return {
        "replayed": steps(target, adam(start), loss, target.new_graphs()),
        "launched": steps(target, adam(start), loss, None),
        "published": lambda batch: published.step(fresh(batch)),
    }


def tune(student: LanguageModel, batch: Batch, start: Tensor) -> Ways:
    loss = tuning_objective(student, TASK)
    plan = PrivacyPlan.make(PrivacyConfig(seed=0), 1000, batch_size=len(batch), steps=100)
    private = plan.optimizer(nn.Parameter(start.clone()), 1e-3)
    return {
        "replayed": steps(student, adam(start), loss, student.new_graphs()),
        "launched": steps(student, adam(start), loss, None),
        "private": steps(student, private, loss, None),
    }


def whole_transfer(target: LanguageModel) -> dict[str, float]:
    """Seconds of a whole transfer with the default settings, on random words: with CUDA graphs, and launched."""
    draw = random.Random(0)
    words = WORDS.split()
    public = [" ".join(draw.choices(words, k=draw.randint(10, 40))) for _ in range(1000)]
    student = copy_student(target, chosen_layers(min(STUDENT_LAYERS, target.layers), target.layers))
    prompt, seconds = SoftPrompt.random(target, 20), {}
    for name, make in (("replayed", LanguageModel.new_graphs), ("launched", lambda _: None)):
        with patch.object(LanguageModel, "new_graphs", make):
            torch.cuda.synchronize()
            began = time.perf_counter()
            moving.transfer(target, student, TASK, prompt, public, moving.TransferOptions())
            torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - began
    return seconds


def timed(ways: Ways, batch: Batch, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step of each implementation, alternating, and its peak memory above the baseline."""
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks = dict.fromkeys(ways, 0)
    for turn in range(rounds + 3):  # the first rounds warm up and capture graphs
        for name, step in ways.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, began = torch.cuda.memory_allocated(), time.perf_counter()
            step(batch)
            torch.cuda.synchronize()
            if turn >= 3:
                milliseconds[name].append(1e3 * (time.perf_counter() - began))
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)
    return {name: {"ms": statistics.median(milliseconds[name]), "MB": peaks[name] / 1e6} for name in ways}


def measure(name: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    results, dtypes = [], {"transfer": torch.bfloat16, "tune": torch.float32}
    for part, make in (("transfer", transfer), ("tune", tune)):
        model = random_model(name, dtypes[part], device)
        if part == "tune":
            model = copy_student(model, chosen_layers(min(STUDENT_LAYERS, model.layers), model.layers))
        rate = matrix_rate(device, dtypes[part])
        # Graphs keep their memory, and launched steps need theirs in addition.
        max_positions = plan_step(model, longest=1).positions // 2
        for rows, tokens, length in CASES:
            if rows * (tokens + length) > max_positions:
                continue
            batch = texts(rows, tokens)
            start = 0.02 * torch.randn(length, model.hidden_size, device=device)
            flop = prompt_step(model, tokens_of(batch), rows, length)
            ways = timed(make(model, batch, start), batch, rounds)
            for timing in ways.values():
                timing["share"] = flop / rate / timing["ms"] * 1e3
            case = {"model": name, "part": part, "rows": rows, "tokens": tokens, "length": length}
            results.append({**case, "TFLOP": flop / 1e12, "matrix_rate": rate, "ways": ways})
            print(json.dumps(results[-1]), flush=True)
        if part == "transfer":
            results.append({"model": name, "part": "whole transfer", "seconds": whole_transfer(model)})
            print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    document = {
        "about": about(device),
        "steps": [result for name in arguments.models for result in measure(name, device, arguments.rounds)],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1), "utf-8")


if __name__ == "__main__":
    main()
