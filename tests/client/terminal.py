"""The `post` command, run in the test's process."""

from __future__ import annotations

import pytest

from post_shared.cli.app import build_app, run

Captured = pytest.CaptureFixture[str]


def post(*arguments: object) -> int:
    """The exit status of `post` with these arguments."""
    return run(build_app(), [str(argument) for argument in arguments])
