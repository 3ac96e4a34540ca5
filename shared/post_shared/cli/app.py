"""The ``post`` command. Each side adds its own commands through the entry point group ``post.commands``.

Exit codes: 0 success, 1 an error that POST reports, 2 an invalid command line, 130 Ctrl-C.
Nothing here imports torch, so that ``post --help`` is fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points, version

import typer
from rich.console import Console
from rich.markup import escape

from post_shared.errors import PostError

GROUP = "post.commands"
DISTRIBUTION = "post-transfer"
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
SPIN_COUNT = "10000"
"""Polls of a waiting OpenMP thread before it sleeps (``docs/results.md``): no slower for one process, and no long spins
next to another."""

_ABOUT = "POST: adapt a large language model that you don't own to data that you may not share."


def build_app(sides: Iterable[EntryPoint] | None = None) -> typer.Typer:
    """The app with the commands of every installed side. The help names a missing side and how to install it."""
    app = typer.Typer(
        name="post",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    missing = []
    for side in entry_points(group=GROUP) if sides is None else sides:
        try:
            side.load()(app)
        except ImportError as error:
            missing.append(
                f"The {side.name} commands are missing ({error}). "
                f"Install them: pip install '{DISTRIBUTION}\\[{side.name}]'"
            )

    @app.callback(help="\n\n".join([_ABOUT, *missing]))
    def start(
        version: bool = typer.Option(
            False, "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ) -> None: ...

    return app


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"post {version(DISTRIBUTION)}")
        raise typer.Exit


def print_error(error: PostError) -> None:
    """Print one line on standard error: the error and, to find it in the server's log, the request id."""
    request = f" (request {error.request_id})" if error.request_id else ""
    line = " ".join((error.detail + request).split())
    plain = "".join(char if char.isprintable() else "\ufffd" for char in line)  # no control codes from a server
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/]: {escape(plain)}", highlight=False)


def run(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run one command line; return the exit code."""
    try:
        app(arguments, prog_name="post")
    except PostError as error:
        print_error(error)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR if stop.code else 0
    except Exception as error:
        if os.environ.get("POST_DEBUG"):
            raise
        print_error(PostError(f"{type(error).__name__}: {error} (this is a bug; POST_DEBUG=1 shows the traceback)"))
        return EXIT_ERROR
    return 0


def limit_spinning() -> None:
    """Make a waiting OpenMP thread poll briefly, then sleep: two processes that spin on the same cores slow each other
    down. Call it before torch is loaded; variables that are set already stay.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def main() -> None:
    """The console script."""
    limit_spinning()
    sys.exit(run(build_app()))


if __name__ == "__main__":
    main()
