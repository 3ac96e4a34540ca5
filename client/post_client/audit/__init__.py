"""Privacy audits of tuned prompts on the data owner's machine: how well attacks work, and whether a claimed ε holds.

report = audit(student, task, rows, [Arm(PLAIN, None), Arm(PRIVATE, PrivacyConfig(epsilon=8))], AuditConfig(shadows=16))
print(to_markdown(report))

Nothing leaves the machine. Private shadow prompts spend no budget as long as neither they nor figures computed from
them are shown to anyone who may not see the rows.
"""

from __future__ import annotations

from post_client.audit.audit import Arm, AuditConfig, AuditReport, audit
from post_client.audit.canaries import Finding, audit_in_one_run
from post_client.audit.report import to_json, to_markdown, to_picture
from post_client.audit.shadow_prompts import Shadows, confidences, tune_shadows
from post_shared.method.audit.lira import Attack, attack, likelihood_ratios, random_halves
from post_shared.method.audit.one_run_bound import Evidence, epsilon_lower_bound, evidence, p_value, strongest
from post_shared.method.audit.roc import Curve, Ranking
from post_shared.schemas.reports import Estimate

__all__ = [
    "Arm",
    "Attack",
    "AuditConfig",
    "AuditReport",
    "Curve",
    "Estimate",
    "Evidence",
    "Finding",
    "Ranking",
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
