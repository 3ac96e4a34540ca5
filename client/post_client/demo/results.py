"""The results of a demo run: results.json, a table and a figure."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from post_client.console import write_file
from post_shared.cli.output import print_table

VERSIONS = ("post-transfer", "torch", "transformers", "opacus")
LINES: tuple[tuple[str, str, str], ...] = (
    ("zero_shot", "zero-shot", "the large model, no prompt"),
    ("calibrated", "calibrated zero-shot", "the large model, its label bias removed with public text: no private row"),
    ("prompted_student", "prompted student", "the owner's prompt on the small model"),
    ("direct_reuse", "direct reuse (D)", "the owner's prompt on the large model, without a transfer"),
    ("post", "POST", "the transferred prompt on the large model"),
    ("prompted_student_dp", "prompted student, DP", "the owner's prompt, tuned with differential privacy"),
    ("post_dp", "POST, DP", "the transferred private prompt on the large model"),
    ("upper_bound", "upper bound", "a prompt tuned on the large model itself: forbidden in reality"),
)
"""Member of the results, its name and its description, in the table's order."""


@dataclass(frozen=True)
class DemoResults:
    """The figures of one run; accuracies are on the private test rows."""

    zero_shot: float
    calibrated: float
    prompted_student: float
    direct_reuse: float
    post: float
    prompted_student_dp: float
    post_dp: float
    upper_bound: float | None
    epsilon: float
    delta: float
    n_private_test: int
    seconds: dict[str, float]
    bytes_uploaded: int
    versions: dict[str, str]
    seed: int

    def save(self, path: Path) -> None:
        """Write results.json."""
        write_file(path, (json.dumps(asdict(self), indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that the figures depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in VERSIONS}


def print_results(results: DemoResults, console: Console) -> None:
    """Print the table of accuracies."""
    table = Table(title=f"Accuracy on {results.n_private_test} private test rows", title_justify="left")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("what it is")
    for member, name, description in LINES:
        value = getattr(results, member)
        if value is not None:
            table.add_row(name, f"{value:.3f}", description, style="bold" if member.startswith("post") else None)
    print_table(table, console)
    console.print(what_private_rows_add(results), highlight=False)
    total = sum(results.seconds.values())
    console.print(
        f"DP: ({results.epsilon:g}, {results.delta:g}). The owner uploaded {results.bytes_uploaded:,} bytes in two "
        f"prompts, and the test texts for predictions; no labels were sent. Total time: {total / 60:.1f} minutes.",
        highlight=False,
    )


def what_private_rows_add(results: DemoResults) -> str:
    """POST beside the best that needs no private row, in a sentence."""
    simple = max(results.zero_shot, results.calibrated)
    gains = [("", results.post - simple), (" with DP", results.post_dp - simple)]
    parts = [f"{gain:+.3f}{name}" for name, gain in gains]
    verdict = "add nothing here" if max(gain for _, gain in gains) <= 0 else f"add {' and '.join(parts)}"
    return f"Beside the best of zero-shot and calibrated zero-shot ({simple:.3f}), the private rows {verdict}."


def draw_results(results: DemoResults, path: Path) -> None:
    """Draw one bar per line of the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [(name, getattr(results, member)) for member, name, _ in LINES if getattr(results, member) is not None]
    figure = Figure(figsize=(8, 0.6 + 0.55 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names, values = [name for name, _ in shown], [value for _, value in shown]
    colours = ["#2a6f97" if name.startswith("POST") else "#b8c4cc" for name in names]
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.axvline(results.zero_shot, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"accuracy, {results.n_private_test} private test rows (dotted: zero-shot)")
    axes.set_title(f"POST, seed {results.seed}; DP: ε = {results.epsilon:g}, δ = {results.delta:g}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
