"""Runs the provider's ``post`` command within the test's process."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from post_server.cli import register


def run(*arguments: str) -> str:
    """The standard output of one command; an error is raised."""
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "250"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout
