"""The one-run audit of many private runs on real rows: how often does its lower bound stay below the claimed ε?

All runs are tuned together, each with its own coins, batches and noise. Each run gives two bounds, from data canaries
and from gradient canaries.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from post_client.audit import audit_in_one_run
from post_client.demo.tiny import tiny_model
from post_client.privacy import PrivacyConfig
from post_client.students.checks import load_student
from post_shared.data.rows import Row, read_rows
from post_shared.data.tasks import Task
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import Progress


def measure(
    model: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    config: TuneOptions,
    *,
    epsilon: float,
    runs: int,
    canaries: int | None,
    seed: int = 0,
) -> dict[str, Any]:
    """The bounds of all runs by kind of canary, and how many are at most ``epsilon``."""

    def on_progress(progress: Progress) -> None:
        if progress.step % 10 == 0:
            print(f"{progress.step}/{progress.steps}", dict(progress.metrics), flush=True)

    privacy = PrivacyConfig(epsilon=epsilon)
    audits = audit_in_one_run(
        model, task, rows, config, privacy, canaries=canaries, runs=runs, seed=seed, on_progress=on_progress
    )  # fmt: skip
    bounds: dict[str, list[float]] = {}
    for audit in audits:
        bounds.setdefault(audit.kind, []).append(round(audit.evidence.epsilon, 3))
    return {
        "claimed": epsilon,
        "canaries": audits[0].evidence.canaries,
        "runs": runs,
        "not_refuted": {kind: sum(bound <= epsilon for bound in epsilons) for kind, epsilons in bounds.items()},
        "bounds": bounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="real rows: JSONL with text and label")
    parser.add_argument("--task", default="sst2", help="a preset with the labels of the rows")
    parser.add_argument("--rows", type=int, default=1000, help="number of rows to use, from the first")
    parser.add_argument("--student", type=Path, help="folder of a student; default: a tiny one with random weights")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 8.0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--canaries", type=int)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=64)
    arguments = parser.parse_args()
    task = Task.preset(arguments.task)
    rows = read_rows(arguments.data, labels=task.labels)[: arguments.rows]
    with tempfile.TemporaryDirectory() as folder:
        student = arguments.student or tiny_model(Path(folder), [row.text for row in rows], seed=0)
        model = load_student(student, "auto")
    config = TuneOptions(
        num_virtual_tokens=arguments.length,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=0.015,
        max_length=arguments.max_length,
    )
    for epsilon in arguments.epsilon:
        began = time.perf_counter()
        result = measure(model, task, rows, config, epsilon=epsilon, runs=arguments.runs, canaries=arguments.canaries)
        about = {
            "rows": len(rows),
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "student": f"{model.layers} layers, width {model.hidden_size}",
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "minutes": round((time.perf_counter() - began) / 60, 1),
        }
        print(json.dumps(about | result), flush=True)


if __name__ == "__main__":
    main()
