"""A trade-off report to look at: tables as Markdown, and a picture. Made on the caller's side from the document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_shared.schemas.reports import Estimate, TradeOffReport

SHOWN_SHARE = 0.2
"""Min-K% and Min-K%++ at the share that their authors use, fixed before any figure is seen; the JSON has all shares."""
SCORES = {"min_k": "Min-K%", "min_k_plus": "Min-K%++"}
COLOURS = {"target": "#555555", "student": "#2a6f97"}


@dataclass(frozen=True)
class Section:
    """One table: a title, the columns' names, rows of cells, and what to know about it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def sections(report: TradeOffReport) -> tuple[Section, ...]:
    """All tables of the report."""
    return _size(report), _loss(report), _accuracy(report), _leakage(report)


def markdown(report: TradeOffReport) -> str:
    """The tables as a Markdown document."""
    lines = [f"# {report.student.name} beside {report.target.name}", ""]
    for section in sections(report):
        lines += [f"## {section.title}", ""]
        lines.append("| " + " | ".join(section.columns) + " |")
        lines.append("|---|" + "---:|" * (len(section.columns) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in section.rows]
        lines += ["", *([section.note, ""] if section.note else [])]
    return "\n".join(lines)


def _size(report: TradeOffReport) -> Section:
    models = (report.target, report.student)
    rows = (
        ("layers", *(f"{model.layers}" for model in models), f"{report.student.layers / report.target.layers:.1%}"),
        ("parameters", *(f"{model.parameters:,}" for model in models), f"{report.parameter_share:.1%}"),
        ("bytes", *(f"{model.size_bytes:,}" for model in models), f"{report.byte_share:.1%}"),
    )
    return Section("Size", ("", report.target.name, report.student.name, "share"), rows)


def _loss(report: TradeOffReport) -> Section:
    recorded = report.recorded_loss.losses if report.recorded_loss else {}
    measured = report.measured_loss
    names = {"ce": "L_ce (imitation)", "lm": "L_lm (text)", "cos": "L_cos (hidden states)"}
    rows = tuple(
        (what, f"{getattr(measured, name):.4f}", f"{recorded[name]:.4f}" if name in recorded else "")
        for name, what in names.items()
    )
    origin = f"Recorded by {report.recorded_loss.job_id}." if report.recorded_loss else "No distillation job is known."
    note = f"Measured on {measured.tokens:,} tokens of non-member text. {origin}"
    return Section("Distillation loss", ("", "measured", "recorded"), rows, note)


def _accuracy(report: TradeOffReport) -> Section:
    columns = ("", "always the most frequent", "target", "target, tuned", "student", "student, tuned", "gap")
    rows = tuple(
        (
            each.dataset,
            f"{each.majority:.3f}",
            *map(
                estimate,
                (each.target_zero_shot, each.target_tuned, each.student_zero_shot, each.student_tuned, each.gap),
            ),
        )
        for each in report.tasks
    )
    tests = ", ".join(f"{each.dataset} {each.test_rows}" for each in report.tasks)
    beaten = [each.dataset for each in report.tasks if each.gap_zero_shot.value < 0]
    note = f"95 % intervals; held-out rows: {tests}. Gap: the tuned target less the tuned student. "
    if beaten:
        note += f"The tuned student is above the target without a prompt on {', '.join(beaten)}."
    return Section("Accuracy on public tasks", columns, rows, note.strip())


def _leakage(report: TradeOffReport) -> Section:
    columns = ("", "AUC, target", "AUC, student", "drop", "TPR at 1 % FPR, target", "TPR at 1 % FPR, student")
    rows = tuple(
        (
            f"{SCORES[each.score]}, k = {each.share:.0%}",
            *map(estimate, (each.target.auc, each.student.auc, each.auc_drop, each.target.tpr, each.student.tpr)),
        )
        for each in report.leakage
        if each.share == SHOWN_SHARE
    )
    note = f"{report.members} members, {report.non_members} non-members; guessing gives AUC 0.5 and TPR 0.01."
    if report.non_members < 100:
        note += " With fewer than 100 non-members, the TPR is the one without any false positive."
    return Section("Leakage of training text", columns, rows, note)


def estimate(figure: Estimate) -> str:
    """``0.712 (0.650 to 0.771)``"""
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


# --- picture ------------------------------------------------------------------------------------------


def draw(report: TradeOffReport, path: Path) -> None:
    """Three panels, all with their intervals: size, accuracy on every task, AUC of both attacks over k."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10 + 1.2 * len(report.tasks), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, width_ratios=[1.5, 2 + 1.2 * len(report.tasks), 3])
    _draw_size(report, panels[0])
    _draw_accuracy(report, panels[1])
    _draw_leakage(report, panels[2])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.student.name} beside {report.target.name}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_size(report: TradeOffReport, axes: Any) -> None:
    bars = axes.bar(["parameters", "bytes"], [report.parameter_share, report.byte_share], color=COLOURS["student"])
    axes.bar_label(bars, fmt="{:.0%}")
    axes.set_ylim(0, 1)
    axes.set_title("student, share of the target", fontsize=9)


def _draw_accuracy(report: TradeOffReport, axes: Any) -> None:
    shown = (
        ("target_zero_shot", "target", COLOURS["target"], 0.45),
        ("target_tuned", "target, tuned", COLOURS["target"], 1.0),
        ("student_zero_shot", "student", COLOURS["student"], 0.45),
        ("student_tuned", "student, tuned", COLOURS["student"], 1.0),
    )
    for at, (member, name, colour, alpha) in enumerate(shown):
        figures = [getattr(each, member) for each in report.tasks]
        places = [place + 0.2 * at for place in range(len(figures))]
        values = [each.value for each in figures]
        axes.bar(places, values, 0.19, yerr=_spread(figures), label=name, color=colour, alpha=alpha, capsize=2)
    for place, task in enumerate(report.tasks):
        axes.hlines(task.majority, place - 0.1, place + 0.7, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks([place + 0.3 for place in range(len(report.tasks))], [each.dataset for each in report.tasks])
    axes.set_ylim(0, 1.15)
    axes.set_title("accuracy (dotted: the most frequent label)", fontsize=9)
    axes.legend(fontsize=7, ncols=2, loc="upper left")


def _draw_leakage(report: TradeOffReport, axes: Any) -> None:
    for score, name in SCORES.items():
        some = [each for each in report.leakage if each.score == score]
        for model, colour in COLOURS.items():
            figures = [getattr(each, model).auc for each in some]
            axes.errorbar(
                [100 * each.share for each in some],
                [each.value for each in figures],
                yerr=_spread(figures),
                label=f"{model}, {name}",
                color=colour,
                linestyle="-" if score == "min_k" else "--",
                marker="o",
                markersize=3,
                capsize=2,
            )
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("k, % of a text's tokens")
    axes.set_title("AUC, members against non-members (dotted: guessing)", fontsize=9)
    axes.legend(fontsize=7)


def _spread(figures: Sequence[Estimate]) -> list[list[float]]:
    """How far the intervals reach below and above, as matplotlib wants it."""
    below = [max(0.0, each.value - each.low) for each in figures]
    return [below, [max(0.0, each.high - each.value) for each in figures]]
