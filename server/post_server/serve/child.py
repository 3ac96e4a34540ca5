"""The child processes of ``post serve``: ``python -m post_server.serve.child api|worker|predictor|run``.

Each ends with the supervisor, even if that is killed. Each imports only what it needs, when it needs it: imports are
most of the start-up time.
"""

from __future__ import annotations

import os
import socket
import sys

from post_server.processes import parent_death


def api(listening: int, gate: int) -> None:
    """Serve HTTP on a bound socket, once the other end of the gate is closed: the database is migrated."""
    import uvicorn

    from post_server.api import app  # noqa: F401  a slow import, so before the gate
    from post_server.settings import get_settings

    settings = get_settings()
    with open(gate, "rb") as pipe:
        pipe.read()
    config = uvicorn.Config(
        "post_server.api.app:create_app",
        factory=True,
        log_level=settings.log_level.lower(),
        access_log=False,
        timeout_graceful_shutdown=max(1, min(5, int(settings.stop_seconds / 2))),  # open streams would never end
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=listening)])


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, then run one of the parts."""
    part, rest = arguments[0], arguments[1:]
    if part == "run":  # an exec of another program keeps the kernel's signal, but not our watching thread
        parent_death.die_with_parent(None)
        os.execv(rest[0], rest)  # noqa: S606  the program that embedded_redis found
    from post_server.settings import get_settings

    parent_death.die_with_parent(get_settings().stop_seconds)
    if part == "api":
        api(*map(int, rest))
    elif part == "worker":
        from post_server.worker import main as worker

        sys.exit(worker(get_settings()))
    elif part == "predictor":
        from post_server.predictor import main as predictor

        sys.exit(predictor(get_settings()))
    else:
        raise SystemExit(f"unknown part {part!r}; choose api, worker, predictor or run")


if __name__ == "__main__":
    main(sys.argv[1:])
