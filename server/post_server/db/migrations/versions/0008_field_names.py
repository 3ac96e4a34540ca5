"""The field's names in the requests of jobs, and in what reports keep of theirs.

Revision: 0008
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

NAMES: dict[str, dict[str, str]] = {
    "distil": {
        "start": "student_init",
        "answer_forms": "templates",
        "minutes": "max_minutes",
        "plateau": "early_stopping",
        "accumulate": "gradient_accumulation_steps",
    },
    "transfer": {"start": "prompt_init"},
}
"""Old name -> new name, by the kind of the job."""
VALUES = {"student_init": {"fold": "least_squares"}, "prompt_init": {"task": "instruction"}}
TUNING = {
    "steps": "steps",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "length": "num_virtual_tokens",
    "max_length": "max_length",
}
"""What a report says about tuning: old name in the request -> new name under ``tuning``."""


def renamed(kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with today's names."""
    if kind == "report":
        tuning = {new: request[old] for old, new in TUNING.items() if old in request}
        rest = {name: value for name, value in request.items() if name not in TUNING}
        return {**rest, **({"tuning": tuning} if tuning else {})}
    names = NAMES.get(kind, {})
    found = {names.get(name, name): value for name, value in request.items()}
    return {
        name: VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
        for name, value in found.items()
    }


def restored(kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with the names of before."""
    if kind == "report":
        tuning = request.get("tuning") or {}
        rest = {name: value for name, value in request.items() if name != "tuning"}
        return {**rest, **{old: tuning[new] for old, new in TUNING.items() if new in tuning}}
    back = {new: old for old, new in NAMES.get(kind, {}).items()}
    values = {name: {new: old for old, new in some.items()} for name, some in VALUES.items()}
    found = {
        name: values.get(name, {}).get(value, value) if isinstance(value, str) else value
        for name, value in request.items()
    }
    return {back.get(name, name): value for name, value in found.items()}


def upgrade() -> None:
    """Jobs that wait go on, and what ended stays readable."""
    _rewrite(renamed)


def downgrade() -> None:
    """The names of before."""
    _rewrite(restored)


def _rewrite(change: Any) -> None:
    connection = op.get_bind()
    jobs = sa.table(
        "jobs",
        sa.column("id", sa.String),
        sa.column("kind", sa.String),
        sa.column("request", sa.JSON),
        sa.column("result", sa.JSON),
    )
    for row in connection.execute(sa.select(jobs)).all():
        request, result = _plain(row.request), _plain(row.result)
        values: dict[str, Any] = {"request": change(row.kind, request)}
        if row.kind == "report" and isinstance(result, dict) and "request" in result:
            values["result"] = {**result, "request": change(row.kind, result["request"])}
        if values["request"] != request or "result" in values:
            connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(**values))


def _plain(value: Any) -> Any:
    """Some drivers hand JSON out as text."""
    return json.loads(value) if isinstance(value, str) else value
