"""Audits of tuned prompts, on the data owner's machine: what an attacker finds, and whether a claimed ε can be true.

report = audit(student, task, rows, [Arm(PLAIN, None), Arm(PRIVATE, PrivacyConfig(epsilon=8))], AuditConfig(shadows=16))
print(to_markdown(report))

Nothing here leaves the machine. Private shadow prompts spend no budget as long as neither they nor figures computed
from them are shown to anyone who may not see the rows.
"""

from __future__ import annotations

from post_client.audit.bound import Evidence, epsilon_lower_bound, evidence, p_value, strongest
from post_client.audit.canaries import Finding, audit_in_one_run
from post_client.audit.lira import Attack, attack, likelihood_ratios
from post_client.audit.report import to_json, to_markdown, to_picture
from post_client.audit.shadows import Shadows, confidences, random_halves, tune_shadows
from post_client.audit.whole import Arm, AuditConfig, Report, audit
from post_shared.estimates import Curve, Ranking
from post_shared.report_schemas import Estimate

__all__ = [
    "Arm",
    "Attack",
    "AuditConfig",
    "Curve",
    "Estimate",
    "Evidence",
    "Finding",
    "Ranking",
    "Report",
    "Shadows",
    "attack",
    "audit",
    "audit_in_one_run",
    "confidences",
    "epsilon_lower_bound",
    "evidence",
    "likelihood_ratios",
    "p_value",
    "random_halves",
    "strongest",
    "to_json",
    "to_markdown",
    "to_picture",
    "tune_shadows",
]
