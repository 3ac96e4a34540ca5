"""An audit report as JSON, as Markdown tables and as a figure. All of it is private."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from io import BytesIO
from typing import Any

from post_client.audit.audit import AuditReport
from post_client.audit.canaries import Finding
from post_shared.method.audit.lira import Attack
from post_shared.schemas.reports import Estimate

KEEP = (
    "PRIVATE: these figures are computed from your rows without noise, and no epsilon covers them. Nothing was sent. "
    "Keep them on this machine, and show them only to people who may see the rows."
)
KINDS = {"data": "rows with wrong labels", "gradient": "gradients (white box)"}
CURVE_POINTS = 400


def to_json(report: AuditReport) -> str:
    """The whole report as JSON, with subsampled curves."""
    document: dict[str, Any] = {
        "private": KEEP,
        "about": report.about,
        "lira": [{"arm": arm} | _attack(attack) for arm, attacks in report.attacks.items() for attack in attacks],
        "one_run": [asdict(finding) | {"refuted": finding.refuted} for finding in report.findings],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _attack(attack: Attack) -> dict[str, Any]:
    step = max(1, len(attack.curve.false_positives) // CURVE_POINTS)
    curve = [attack.curve.false_positives[::step].tolist(), attack.curve.true_positives[::step].tolist()]
    return {
        "variant": attack.variant,
        "auc": attack.auc.model_dump(),
        "true_positives": {f"{rate:g}": estimate.model_dump() for rate, estimate in attack.true_positives.items()},
        "auc_by_chance": list(attack.chance),
        "p_value": attack.p_value,
        "members": attack.members,
        "others": attack.others,
        "curve": {"false_positives": curve[0], "true_positives": curve[1]},
    }


def to_markdown(report: AuditReport) -> str:
    """Both tables, after a note on their confidentiality."""
    return "\n".join([KEEP, *_lira_lines(report), *_one_run_lines(report)]) + "\n"


def _lira_lines(report: AuditReport) -> Iterator[str]:
    if not report.attacks:
        return
    rates = list(next(iter(report.attacks.values()))[0].true_positives)
    yield ""
    rate_columns = "".join(f" TPR at {rate:.1%} FPR |" for rate in rates)
    yield f"| LiRA | AUC | AUC by chance | p |{rate_columns}"
    yield "|---" * (4 + len(rates)) + "|"
    for arm, attacks in report.attacks.items():
        for attack in attacks:
            chance = f"{attack.chance[0]:.3f}–{attack.chance[1]:.3f}"
            cells = [f"{arm}, {attack.variant}", _estimate(attack.auc), chance]
            cells += [f"{attack.p_value:.3f}", *(_estimate(attack.true_positives[rate]) for rate in rates)]
            yield "| " + " | ".join(cells) + " |"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"


def _one_run_lines(report: AuditReport) -> Iterator[str]:
    if not report.findings:
        return
    yield ""
    yield "| one-run audit, canaries | number | guesses | right | ε is at least | ε claimed | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for finding in report.findings:
        yield _finding(finding)


def _finding(finding: Finding) -> str:
    evidence = finding.evidence
    bound = f"{evidence.epsilon:.2f} ({evidence.confidence:.0%}, δ = {evidence.delta:g})"
    verdict = "**the claim is refuted**" if finding.refuted else "no contradiction"
    return (
        f"| {KINDS[finding.kind]} | {evidence.canaries} | {evidence.guesses} | {evidence.right} "
        f"| {bound} | {finding.claimed:g} | {verdict} |"
    )


def to_picture(report: AuditReport) -> bytes:
    """The ROC curves as PNG, on logarithmic axes: low false positive rates matter most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    min_rate = 1.0
    for color, (arm, attacks) in enumerate(report.attacks.items()):
        for attack in attacks:
            min_rate = min(min_rate, 1.0 / attack.others)
            axes.step(
                attack.curve.false_positives,
                attack.curve.true_positives,
                where="post",
                color=f"C{color}",
                linestyle="-" if attack.variant == "online" else "--",
                label=f"{arm}, {attack.variant}: AUC {attack.auc.value:.3f}",
            )
    axes.plot([min_rate, 1.0], [min_rate, 1.0], color="grey", linewidth=0.8, label="guessing")
    axes.set(xscale="log", yscale="log", xlim=(min_rate, 1.0), ylim=(min_rate, 1.0))
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
