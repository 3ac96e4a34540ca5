"""Render a trade-off report as Markdown tables and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_shared.schemas.reports import Estimate, TradeOffReport

SHOWN_SHARE = 0.2
"""The share k that the authors of Min-K% and Min-K%++ use, chosen in advance; the JSON has all shares."""
SCORES = {"min_k": "Min-K%", "min_k_plus": "Min-K%++"}
COLOURS = {"target": "#555555", "student": "#2a6f97"}


@dataclass(frozen=True)
class Section:
    """One table: a title, column names, rows of cells, and a note."""

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
        (label, f"{getattr(measured, name):.4f}", f"{recorded[name]:.4f}" if name in recorded else "")
        for name, label in names.items()
    )
    origin = f"Recorded by {report.recorded_loss.job_id}." if report.recorded_loss else "No distillation job is known."
    note = f"Measured on {measured.tokens:,} tokens of non-member text. {origin}"
    return Section("Distillation loss", ("", "measured", "recorded"), rows, note)


def _accuracy(report: TradeOffReport) -> Section:
    columns = (
        "",
        "majority label",
        "target",
        "target, calibrated",
        "target, tuned",
        "student",
        "student, tuned",
        "gap",
    )
    rows = tuple(
        (
            task.dataset,
            f"{task.majority:.3f}",
            estimate(task.target_zero_shot),
            "not measured" if task.target_calibrated is None else estimate(task.target_calibrated),
            *map(estimate, (task.target_tuned, task.student_zero_shot, task.student_tuned, task.gap)),
        )
        for task in report.tasks
    )
    tests = ", ".join(f"{task.dataset} {task.test_rows}" for task in report.tasks)
    better = [task.dataset for task in report.tasks if (task.gap_calibrated or task.gap_zero_shot).value < 0]
    note = f"95 % intervals; held-out rows: {tests}. Gap: tuned target minus tuned student. "
    if better:
        note += (
            f"The tuned student beats the target without a prompt (calibrated, where measured) on {', '.join(better)}."
        )
    return Section("Accuracy on public tasks", columns, rows, note.strip())


def _leakage(report: TradeOffReport) -> Section:
    columns = ("", "AUC, target", "AUC, student", "drop", "TPR at 1 % FPR, target", "TPR at 1 % FPR, student")
    rows = tuple(
        (
            f"{SCORES[attack.score]}, k = {attack.share:.0%}",
            *map(
                estimate,
                (attack.target.auc, attack.student.auc, attack.auc_drop, attack.target.tpr, attack.student.tpr),
            ),
        )
        for attack in report.leakage
        if attack.share == SHOWN_SHARE
    )
    note = f"{report.members} members, {report.non_members} non-members; guessing gives AUC 0.5 and TPR 0.01."
    if report.non_members < 100:
        note += " With fewer than 100 non-members, the TPR is measured without any false positive."
    return Section("Leakage of training text", columns, rows, note)


def estimate(figure: Estimate) -> str:
    """``0.712 (0.650 to 0.771)``"""
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


# --- figure -------------------------------------------------------------------------------------------


def draw(report: TradeOffReport, path: Path) -> None:
    """Draw three panels with intervals: size, accuracy on every task, AUC of both attacks over k."""
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
    shown: tuple[tuple[str, str, str, float], ...] = (
        ("target_zero_shot", "target", COLOURS["target"], 0.45),
        ("target_tuned", "target, tuned", COLOURS["target"], 1.0),
        ("student_zero_shot", "student", COLOURS["student"], 0.45),
        ("student_tuned", "student, tuned", COLOURS["student"], 1.0),
    )
    if all(task.target_calibrated for task in report.tasks):
        shown = (shown[0], ("target_calibrated", "target, calibrated", COLOURS["target"], 0.7), *shown[1:])
    width = 0.8 / len(shown)
    for bar, (member, name, colour, alpha) in enumerate(shown):
        estimates = [getattr(task, member) for task in report.tasks]
        positions = [x + width * bar for x in range(len(estimates))]
        values = [each.value for each in estimates]
        axes.bar(
            positions,
            values,
            0.95 * width,
            yerr=_error_bars(estimates),
            label=name,
            color=colour,
            alpha=alpha,
            capsize=2,
        )
    for x, task in enumerate(report.tasks):
        axes.hlines(task.majority, x - 0.1, x + 0.7, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks([x + 0.3 for x in range(len(report.tasks))], [task.dataset for task in report.tasks])
    axes.set_ylim(0, 1.15)
    axes.set_title("accuracy (dotted: majority label)", fontsize=9)
    axes.legend(fontsize=7, ncols=2, loc="upper left")


def _draw_leakage(report: TradeOffReport, axes: Any) -> None:
    for score, name in SCORES.items():
        attacks = [attack for attack in report.leakage if attack.score == score]
        for model, colour in COLOURS.items():
            estimates = [getattr(attack, model).auc for attack in attacks]
            axes.errorbar(
                [100 * attack.share for attack in attacks],
                [each.value for each in estimates],
                yerr=_error_bars(estimates),
                label=f"{model}, {name}",
                color=colour,
                linestyle="-" if score == "min_k" else "--",
                marker="o",
                markersize=3,
                capsize=2,
            )
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("k, % of a text's tokens")
    axes.set_title("AUC, members vs. non-members (dotted: guessing)", fontsize=9)
    axes.legend(fontsize=7)


def _error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances from the values to their lower and upper bounds, (2, N) for matplotlib's ``yerr``."""
    below = [max(0.0, each.value - each.low) for each in estimates]
    return [below, [max(0.0, each.high - each.value) for each in estimates]]
