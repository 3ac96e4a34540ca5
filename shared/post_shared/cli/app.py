"""The ``post`` command. Each side adds its own verbs through the entry point group ``post.commands``.

Exit codes: 0 all went well, 1 POST says what went wrong, 2 the command line can't be understood, 130 Ctrl-C.
Nothing here imports torch, so ``post --help`` answers at once.
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
SPINS = "10000"
"""Looks of a waiting OpenMP thread (``docs/results.md``): no slower alone, and not for ever beside another process."""

_ABOUT = "POST: adapt a large language model that you don't own to data that you may not share."


def build_app(sides: Iterable[EntryPoint] | None = None) -> typer.Typer:
    """The app with the verbs of every installed side; a missing side is named in the help, with its cure."""
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
                f"The {side.name} verbs are absent ({error}). Install them: pip install '{DISTRIBUTION}\\[{side.name}]'"
            )

    @app.callback(help="\n\n".join([_ABOUT, *missing]))
    def start(
        version: bool = typer.Option(
            False, "--version", help="Print the version and leave.", callback=_print_version, is_eager=True
        ),
    ) -> None: ...

    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"post {version(DISTRIBUTION)}")
        raise typer.Exit


def print_error(error: PostError) -> None:
    """One line on standard error: what went wrong and, for the server's log, which request it was."""
    number = f" (request {error.request_id})" if error.request_id else ""
    line = " ".join((error.detail + number).split())
    plain = "".join(each if each.isprintable() else "\ufffd" for each in line)  # a server's text steers no terminal
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/]: {escape(plain)}", highlight=False)


def run(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
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
        print_error(PostError(f"{type(error).__name__}: {error} (this is a defect; POST_DEBUG=1 shows where)"))
        return EXIT_ERROR
    return 0


def give_way() -> None:
    """Let a thread that waits for the others of its sum look for them shortly, then sleep: two processes that look for
    long on the same cores keep each other from finishing. Call it before torch is loaded; what is set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def main() -> None:
    """The console script."""
    give_way()
    sys.exit(run(build_app()))


if __name__ == "__main__":
    main()
