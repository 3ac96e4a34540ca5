"""The data owner's ``post`` commands, and those of the provider that use the HTTP API.

Heavy libraries are imported when a command runs, so ``post --help`` is fast.
"""

from __future__ import annotations

from importlib.util import find_spec

import typer

from post_client.cli.accountant import accountant
from post_client.cli.audit import audit
from post_client.cli.demo import demo
from post_client.cli.distil import distil
from post_client.cli.evaluate import evaluate
from post_client.cli.generate import generate
from post_client.cli.jobs import jobs
from post_client.cli.ledger import ledger
from post_client.cli.predict import predict
from post_client.cli.pull import pull
from post_client.cli.push import push
from post_client.cli.report import report
from post_client.cli.transfer import transfer
from post_client.cli.tune import tune

OWNER, PROVIDER, BOTH = "Data owner", "Provider", "Both"


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``.

    Raises:
        ImportError: the extra ``client`` isn't installed.
    """
    if find_spec("opacus") is None:
        raise ImportError("No module named 'opacus'")
    owner_commands = (pull, tune, audit, push, transfer, predict, generate, ledger, accountant)
    for command in owner_commands:
        app.command(command.__name__, rich_help_panel=OWNER)(command)
    app.command("distil", rich_help_panel=PROVIDER)(distil)
    app.add_typer(report, name="report", rich_help_panel=PROVIDER)
    app.command("evaluate", rich_help_panel=BOTH)(evaluate)
    app.add_typer(jobs, name="jobs", rich_help_panel=BOTH)
    app.command("demo", rich_help_panel=BOTH)(demo)
