"""How fast a student approaches its target: the paper's recipe against POST's, alternating on the same machine.

Both train in alternating slices of a few seconds, so that other load on the machine affects both. Each has its own
clock, which counts its initialisation (including least squares) and its steps, but not the measurement of L_ce on
held-out text. On a busy machine, ``--clock cpu`` counts processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from post_shared.data.rows import read_corpus
from post_shared.method.distillation.corpus import Corpus, TokenTargets, next_token, prepare_corpus
from post_shared.method.distillation.distil import WARM_UP, choose_layers, initial_student
from post_shared.method.distillation.objective import Objective
from post_shared.method.distillation.trainer import HEAD_SHARE, DistillationStep, Student
from post_shared.method.losses import softened_cross_entropy
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.distributed import ALONE
from post_shared.training.schedule import warm_then_linear

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
TEMPERATURE = 2.0
HELD_OUT_BLOCKS = 64
HELD_OUT_SHARE = 0.1
PAPER_ROWS = 5
RECIPES = {
    "paper": "copied layers, half from each end; 2.5e-4; 5 sequences; LM head at all positions",
    "post": "least squares, layers dense in front; 1e-3; 8 sequences; LM head at a quarter of the positions; templates",
}


def recipes(length: int, layers: int, pattern: str, templates: Sequence[str]) -> dict[str, tuple[DistilOptions, float]]:
    """name -> (configuration, share of the positions with losses over the vocabulary)."""
    paper = DistilOptions(
        keep_layers=layers,
        layer_pattern="ends",
        student_init="copy",
        max_minutes=1.0,
        learning_rate=2.5e-4,
        batch_tokens=PAPER_ROWS * length,
        sequence_length=length,
    )
    ours = DistilOptions(
        keep_layers=layers, layer_pattern=pattern, max_minutes=1.0, sequence_length=length, templates=tuple(templates)
    )
    return {"paper": (paper, 1.0), "post": (ours, HEAD_SHARE)}


class HeldOut:
    """L_ce of Eq. 1 on text that no recipe trains on; the target's logits are computed once."""

    def __init__(self, target: LanguageModel, corpus: Corpus) -> None:
        block = corpus.batch(0, HELD_OUT_BLOCKS, 0)
        self._positions: TokenTargets = next_token(block, HELD_OUT_SHARE, torch.Generator().manual_seed(0))
        self._target_logits = self._logits(target)

    def loss(self, student: LanguageModel) -> float:
        return float(softened_cross_entropy(self._target_logits, self._logits(student), TEMPERATURE).mean())

    @torch.no_grad()
    def _logits(self, model: LanguageModel) -> Tensor:
        """(P, V) at the measured positions."""
        rows, positions = self._positions.rows.to(model.device), self._positions.positions.to(model.device)
        return model.head(model.hidden(self._positions.inputs)[rows, positions])


@dataclass
class Run:
    """The training run of one recipe. ``curve`` has (seconds of its own clock, L_ce)."""

    descent: DistillationStep
    config: DistilOptions
    seconds: float
    layers: list[int]
    now: Callable[[], float]
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def start(
        cls, target: LanguageModel, corpus: Corpus, config: DistilOptions, share: float, now: Callable[[], float]
    ) -> Run:
        began = now()
        kept = choose_layers(target, corpus, config).kept
        model = initial_student(target, corpus, config, config.student_init, kept=kept)
        student = Student(model, learning_rate=config.learning_rate, freeze_head=True, freeze_embeddings=True)
        objective = Objective(target, model, config.temperature)
        descent = DistillationStep(student, objective, corpus, ALONE, config.rows, 1, config.seed, share)
        return cls(descent, config, now() - began, list(kept), now)

    def slice(self, seconds: float, total: float) -> None:
        """Train for about ``seconds``; the learning rate falls to 0 after ``total`` seconds."""
        began, before = self.now(), self.seconds
        while self.seconds < min(before + seconds, total):
            self.descent.gradients(self.steps)
            rate = warm_then_linear(max(self.seconds / total, 1e-3), WARM_UP)
            self.descent.student.step(self.config.learning_rate * rate)
            self.steps += 1
            self.seconds = before + self.now() - began

    def measure(self, held_out: HeldOut) -> None:
        self.curve.append((self.seconds, held_out.loss(self.descent.student.model)))


def run(
    target: LanguageModel,
    paragraphs: Sequence[str],
    *,
    layers: int,
    pattern: str,
    templates: Sequence[str],
    length: int,
    seconds: float,
    slice_seconds: float,
    clock: str = "wall",
    on_turn: Callable[[dict[str, Run]], None] = lambda runs: None,
) -> dict[str, Run]:
    """Train both recipes for ``seconds`` each."""
    held_out_count = max(1, len(paragraphs) // 20)
    held_out = HeldOut(target, prepare_corpus(target, paragraphs[:held_out_count], length, None))
    runs = {}
    for name, (config, share) in recipes(length, layers, pattern, templates).items():
        corpus = prepare_corpus(target, paragraphs[held_out_count:], length, None, templates=config.templates)
        runs[name] = Run.start(target, corpus, config, share, CLOCKS[clock])
        runs[name].measure(held_out)
    for name, current in _turns(runs, seconds):
        current.slice(slice_seconds, seconds)
        current.measure(held_out)
        print(f"{name:6} {current.seconds:7.1f} s  step {current.steps:5}  L_ce {current.curve[-1][1]:.3f}", flush=True)
        on_turn(runs)
    return runs


def _turns(runs: dict[str, Run], seconds: float) -> Iterator[tuple[str, Run]]:
    """The run with less time so far is next."""
    while min(run.seconds for run in runs.values()) < seconds:
        yield min(runs.items(), key=lambda pair: pair[1].seconds)


def first_reach(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Seconds until the curve was at most ``loss``, with linear interpolation between measurements."""
    before: tuple[float, float] | None = None
    for seconds, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (seconds, value)
    return None


def result(runs: dict[str, Run]) -> dict[str, object]:
    """How much sooner POST's recipe reaches the lowest loss of the paper's."""
    reached, lowest = min(runs["paper"].curve, key=lambda point: point[1])
    ours = first_reach(runs["post"].curve, lowest)
    return {
        "ce": round(lowest, 4),
        "paper_seconds": round(reached, 1),
        "post_seconds": None if ours is None else round(ours, 1),
        "ratio": None if ours is None else round(reached / ours, 2),
        "last": {name: round(run.curve[-1][1], 4) for name, run in runs.items()},
        "steps": {name: run.steps for name, run in runs.items()},
        "layers": {name: run.layers for name, run in runs.items()},
        "curve": {name: [[round(time, 1), round(loss, 4)] for time, loss in run.curve] for name, run in runs.items()},
    }


def table(figures: dict[str, object], runs: dict[str, Run]) -> str:
    """The figures as a Markdown table."""
    head = [
        "recipe",
        "initialised after",
        "L_ce then",
        "L_ce at the end",
        "steps",
        "time to the paper's lowest",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, run in runs.items():
        first, last = run.curve[0], run.curve[-1]
        seconds = figures[f"{name}_seconds"]
        reached = "not reached" if seconds is None else f"{seconds} s"
        cells = [f"{name}: {RECIPES[name]}", f"{first[0]:.0f} s", f"{first[1]:.2f}", f"{last[1]:.2f}"]
        cells += [str(run.steps), reached]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, Run], path: Path) -> None:
    """Plot L_ce over each recipe's own seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    for name, run in runs.items():
        axes.plot(*zip(*run.curve, strict=True), marker=".", label=f"{name} recipe")
    axes.set_xlabel("seconds of distillation, including initialisation")
    axes.set_ylabel("held-out L_ce")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="folder, GGUF file or hub id")
    parser.add_argument("--corpus", type=Path, required=True, help="plain text, one paragraph per line")
    parser.add_argument(
        "--json", type=Path, required=True, help="file for the figures; the table and plot go beside it"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pattern", default="front", help="layer pattern of POST's recipe")
    parser.add_argument("--answer-form", action="append", help="template of POST's recipe; default: '{text} It was'")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--minutes", type=float, default=5.0, help="minutes per recipe")
    parser.add_argument("--slice", type=float, default=15.0, help="seconds per slice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time of all threads")
    arguments = parser.parse_args()
    target = LanguageModel.load(arguments.target, for_training=True)
    about = {
        "target": Path(arguments.target).name,
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }

    def write(runs: dict[str, Run]) -> None:
        arguments.json.write_text(json.dumps({**about, **result(runs)}, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(table(result(runs), runs))
        draw(runs, arguments.json.with_suffix(".png"))

    runs = run(
        target,
        read_corpus(arguments.corpus),
        layers=arguments.layers,
        pattern=arguments.pattern,
        templates=arguments.answer_form or ["{text} It was"],
        length=arguments.length,
        seconds=arguments.minutes * 60,
        slice_seconds=arguments.slice,
        clock=arguments.clock,
        on_turn=write,
    )
    print(table(result(runs), runs))
    print(f"ratio {result(runs)['ratio']}")


if __name__ == "__main__":
    main()
