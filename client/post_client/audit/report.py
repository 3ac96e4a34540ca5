"""The findings of an audit as JSON, as a Markdown table, and as a picture. All of it is private."""

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
    "Keep them on this machine, and show them only to those who may see the rows."
)
KINDS = {"data": "rows with wrong labels", "gradient": "gradients (white box)"}
CURVE_POINTS = 400


def to_json(report: AuditReport) -> str:
    """Everything in the report, curves thinned."""
    document: dict[str, Any] = {
        "private": KEEP,
        "about": report.about,
        "lira": [{"arm": arm} | _attack(each) for arm, some in report.attacks.items() for each in some],
        "one_run": [asdict(each) | {"refuted": each.refuted} for each in report.findings],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _attack(each: Attack) -> dict[str, Any]:
    step = max(1, len(each.curve.false_positives) // CURVE_POINTS)
    curve = [each.curve.false_positives[::step].tolist(), each.curve.true_positives[::step].tolist()]
    return {
        "variant": each.variant,
        "auc": each.auc.model_dump(),
        "true_positives": {f"{rate:g}": estimate.model_dump() for rate, estimate in each.true_positives.items()},
        "auc_by_chance": list(each.chance),
        "p_value": each.p_value,
        "members": each.members,
        "others": each.others,
        "curve": {"false_positives": curve[0], "true_positives": curve[1]},
    }


def to_markdown(report: AuditReport) -> str:
    """Both tables, and what may be done with them."""
    return "\n".join([KEEP, *_lira_lines(report), *_one_run_lines(report)]) + "\n"


def _lira_lines(report: AuditReport) -> Iterator[str]:
    if not report.attacks:
        return
    rates = list(next(iter(report.attacks.values()))[0].true_positives)
    yield ""
    heads = "".join(f" TPR at {rate:.1%} FPR |" for rate in rates)
    yield f"| LiRA | AUC | AUC by chance | p |{heads}"
    yield "|---" * (4 + len(rates)) + "|"
    for arm, some in report.attacks.items():
        for each in some:
            cells = [f"{arm}, {each.variant}", _estimate(each.auc), f"{each.chance[0]:.3f}–{each.chance[1]:.3f}"]
            cells += [f"{each.p_value:.3f}", *(_estimate(each.true_positives[rate]) for rate in rates)]
            yield "| " + " | ".join(cells) + " |"


def _estimate(each: Estimate) -> str:
    return f"{each.value:.3f} ({each.low:.3f}–{each.high:.3f})"


def _one_run_lines(report: AuditReport) -> Iterator[str]:
    if not report.findings:
        return
    yield ""
    yield "| one run, canaries | number | guesses | right | ε is at least | ε claimed | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for each in report.findings:
        yield _finding(each)


def _finding(each: Finding) -> str:
    proof = each.evidence
    verdict = "**the claim is refuted**" if each.refuted else "no contradiction"
    return (
        f"| {KINDS[each.kind]} | {proof.canaries} | {proof.guesses} | {proof.right} "
        f"| {proof.epsilon:.2f} ({proof.confidence:.0%}, δ = {proof.delta:g}) | {each.claimed:g} | {verdict} |"
    )


def to_picture(report: AuditReport) -> bytes:
    """The ROC curves on logarithmic axes, as PNG: what matters is who is found at very few false alarms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(5.6, 4.8), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    least = 1.0
    for color, (arm, some) in enumerate(report.attacks.items()):
        for each in some:
            least = min(least, 1.0 / each.others)
            axes.step(
                each.curve.false_positives,
                each.curve.true_positives,
                where="post",
                color=f"C{color}",
                linestyle="-" if each.variant == "online" else "--",
                label=f"{arm}, {each.variant}: AUC {each.auc.value:.3f}",
            )
    axes.plot([least, 1.0], [least, 1.0], color="grey", linewidth=0.8, label="guessing")
    axes.set(xscale="log", yscale="log", xlim=(least, 1.0), ylim=(least, 1.0))
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    picture = BytesIO()
    canvas.savefig(picture, format="png", dpi=150)
    return picture.getvalue()
