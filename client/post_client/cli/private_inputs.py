"""What the verbs that read private rows share: checks of paths, public texts, the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from post_client.console import (
    err,
    usage_error,
)

if TYPE_CHECKING:
    from post_client.privacy import PrivacyConfig
    from post_shared.data.rows import Row
    from post_shared.data.tasks import Task

DEFAULT_EPSILON = 8.0


def check_outside(student: Path, paths: Sequence[Path | None]) -> None:
    """A prompt names the student by a hash of its folder: nothing private may lie in there."""
    for path in paths:
        if path is not None and path.resolve().is_relative_to(student.resolve()):
            usage_error(
                f"{path} lies in the student's folder, and a hash of all that lies there leaves with the prompt."
            )


def public_rows(public: Path, columns: dict[str, str | None], judged: Task | None, private: Sequence[Row]) -> list[Row]:
    """The rows of ``public``, with labels if they judge. A warning for these eyes only when private ones are there."""
    from post_client.privacy.statement import also_public
    from post_shared.data.rows import read_rows
    from post_shared.method.tuning.label_bias import check_public

    label_column = columns["label_column"] if judged else None
    rows = read_rows(
        public,
        text_column=str(columns["text_column"]),
        label_column=label_column,
        labels=judged.labels if judged else None,
    )
    texts = [row.text for row in rows]
    check_public(texts, str(public))
    shared = also_public(private, texts)
    if shared:
        err.print(
            f"[bold yellow]{shared} private rows have a text that is in {escape(str(public))} too. Public texts enter "
            "without noise: for those rows nothing is promised. Take them out.[/]"
        )
    return rows


def privacy_config(
    epsilon: float | None, delta: float | None, max_grad_norm: float | None, *, per_user: bool = False
) -> PrivacyConfig:
    from post_client.privacy import PrivacyConfig

    budget = PrivacyConfig(
        epsilon=DEFAULT_EPSILON if epsilon is None else epsilon, delta=delta, unit="user" if per_user else "row"
    )
    return budget if max_grad_norm is None else replace(budget, max_grad_norm=max_grad_norm)
